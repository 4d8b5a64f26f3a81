"""Show what is in a checkpoint."""

from convert.architecture import Architecture
from convert.reader import Source
from convert.selection import find_candidates


def list_contents(source: Source) -> str:
    """A text with the encoders of a file, best first, and its tables of tensors."""
    candidates, containers = find_candidates(source)
    lines = [f"{source.path}", "encoders (the first is taken unless --branch says another):"]
    for candidate in candidates:
        verdict = candidate.verdict
        if isinstance(verdict, Architecture):
            size = 4 * sum(tensor.count for tensor in candidate.tensors.values()) / 1e6
            what = f"{verdict.name}, {len(candidate.tensors)} tensors, {size:.1f} MB"
        else:
            what = f"cannot be converted: {verdict}"
        lines.append(f"  {candidate.branch}  [{candidate.family.name}]  {what}")
    if not candidates:
        lines.append("  none")
    lines.append("tables:")
    lines += [
        f"  {table.label or 'top'}: {len(table.tensors)} tensors, {table.bytes / 1e6:.1f} MB" for table in containers
    ]
    return "\n".join(lines)

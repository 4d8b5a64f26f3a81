"""Convert the ResNet of any public checkpoint into weights for Detectron2.

    python convert/to_d2.py INPUT --list
    python convert/to_d2.py INPUT OUTPUT.pkl [--verify] [--branch NAME] [--drop NAME] [--allow-unknown] [--overwrite]
    python convert/to_d2.py INPUT OUTPUT --to torchvision|timm|safetensors

INPUT is a checkpoint or the folder of a run. Beside the weights a sidecar is written, OUTPUT.json, whose fields
`convert.sidecar` lists. Every tensor of the encoder is written, in float32. Every other tensor has to be known by its
name and is left out; otherwise the conversion stops with an error, and nothing is written.
"""

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from convert.architecture import Architecture
from convert.export import SUFFIXES, export
from convert.pixels import find_pixels
from convert.reader import Source, checkpoint_in, read_checkpoint
from convert.selection import find_candidates, select
from convert.sidecar import describe, lazy_settings, yaml_settings
from convert.sidecar_files import sidecar_path
from foundation.errors import ArgumentParser, UserError, run


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="to_d2.py", description="Convert a ResNet of any public checkpoint for Detectron2.")
    parser.add_argument("input", type=Path, help="a checkpoint of any kind, or the folder of a run")
    parser.add_argument("output", type=Path, nargs="?", help="file to write; ends in .pkl for Detectron2")
    parser.add_argument("--to", choices=sorted(SUFFIXES), default="d2", help="what to write (default: d2)")
    parser.add_argument("--branch", help="which encoder of the file, as --list names it")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave out tensors whose names begin with NAME"
    )
    parser.add_argument("--verify", action="store_true", help="compare the features of both networks on images")
    parser.add_argument("--list", action="store_true", help="show what is in the file, and convert nothing")
    add_allow_unknown(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def add_allow_unknown(parser: ArgumentParser) -> None:
    """The option `--allow-unknown`, which was called `--trust` once."""
    parser.add_argument("--allow-unknown", action="store_true", help="read unknown classes as empty records")
    parser.add_argument("--trust", dest="allow_unknown", action="store_true", help=SUPPRESS)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, or list; see the module's docstring.

    Raises:
        UserError: anything about the input or the output that the user can mend.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.list:
        print(list_contents(read_checkpoint(checkpoint_in(arguments.input), arguments.allow_unknown)))
        return
    if arguments.output is None:
        raise UserError("name the file to write, or use --list")
    checkpoint = checkpoint_in(arguments.input)
    check_output(checkpoint, arguments.output, arguments.to, arguments.overwrite)
    if arguments.verify and arguments.to != "d2":
        raise UserError("--verify compares with Detectron2's network and needs --to d2")
    source = read_checkpoint(checkpoint, arguments.allow_unknown)
    selection = select(source, arguments.branch, arguments.drop, cifar_stem=arguments.to == "safetensors")
    pixels = find_pixels(source, selection)
    sidecar = describe(source, selection, pixels)
    lines = export(source, arguments.output, arguments.to, selection, pixels, sidecar, arguments.verify)
    print("\n".join([*lines, *summarise(arguments.output, sidecar)]))
    if arguments.to == "d2":
        print("detection/train_net.py reads these settings from the file; for another training script,")
        print("set in a yaml config:", *yaml_settings(sidecar), sep="\n")
        print("set in a LazyConfig:", *lazy_settings(sidecar), sep="\n")


def summarise(output: Path, sidecar: Mapping[str, Any]) -> list[str]:
    """What was converted and what was left out, in lines."""
    return [
        f"{sidecar['source']}: {sidecar['family']}, branch {sidecar['branch']}, {sidecar['architecture']}",
        f"wrote {output}: {sidecar['tensors']} tensors, {sidecar['format']},"
        f" pixel mean {sidecar['pixel_mean']}, std {sidecar['pixel_std']}",
        *(f"  left out: {part} ({count})" for part, count in sidecar["dropped"].items()),
        *(f"  warning: {text}" for text in sidecar["warnings"]),
    ]


def list_contents(source: Source) -> str:
    """A text with the encoders of a file, best first, and its tables of tensors."""
    candidates, containers = find_candidates(source)
    lines = [f"{source.path}", "encoders (the first is converted unless --branch names another):"]
    for candidate in candidates:
        assessment = candidate.assessment
        if isinstance(assessment, Architecture):
            size = 4 * sum(tensor.count for tensor in candidate.tensors.values()) / 1e6
            what = f"{assessment.name}, {len(candidate.tensors)} tensors, {size:.1f} MB"
        else:
            what = f"cannot be converted: {assessment}"
        lines.append(f"  {candidate.branch}  [{candidate.family.name}]  {what}")
    if not candidates:
        lines.append("  none")
    lines.append("tables:")
    lines += [
        f"  {table.label or 'top'}: {len(table.tensors)} tensors, {table.bytes / 1e6:.1f} MB" for table in containers
    ]
    return "\n".join(lines)


def check_output(source: Path, output: Path, target: str, overwrite: bool) -> None:
    """Refuse an output that cannot or must not be written, before any work.

    Args:
        source: the file that is converted.
        output: the file to write; its sidecar is written beside it.
        target: a key of `SUFFIXES`.
        overwrite: whether existing files may be replaced.

    Raises:
        UserError: wrong suffix, a file that exists, a folder, or the input itself.
    """
    if output.suffix not in SUFFIXES[target]:
        raise UserError(f"{output}: --to {target} writes files that end in {' or '.join(SUFFIXES[target])}")
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file in it")
    for path in (output, sidecar_path(output)):
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path} is the input itself; name another file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; use --overwrite to replace it")


def cli() -> NoReturn:
    """The command."""
    run(main)


if __name__ == "__main__":
    cli()

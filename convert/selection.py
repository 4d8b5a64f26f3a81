"""Choose the encoder in a file and account for every tensor beside it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from convert.architecture import Architecture, Shape, UnsupportedArchitecture, infer_architecture, mismatches
from convert.containers import Container, find_containers
from convert.families import DROPPABLE, Family, find_family, name_other_network, preference
from convert.naming import CAFFE2, SCHEMES, Scheme
from convert.reader import Source, read_values
from convert.tensors import StoredTensor
from foundation.errors import UserError

_MOST_ENCODERS = 32
_MOST_NAMES = 200_000  # characters in the names of a table and what is beside it, for each encoder
_COUNTER = "num_batches_tracked"
_NORM_EPS = 1e-5  # of BatchNorm, in torchvision and in Detectron2


@dataclass(frozen=True)
class Candidate:
    """An encoder found in a file, complete or not.

    Attributes:
        container: the table that holds it.
        prefix: of its names, with the last dot or slash.
        scheme: how its tensors are named.
        family: the row of `convert.families.FAMILIES`.
        tensors: by canonical name.
        foreign: names under the prefix that the scheme does not have, with their shapes; they identify other
            networks.
        counters: number of `num_batches_tracked`, which are not converted.
        cifar_stem: a CIFAR stem is accepted.
    """

    container: Container
    prefix: str
    scheme: Scheme
    family: Family
    tensors: dict[str, StoredTensor]
    foreign: dict[str, Shape] = field(default_factory=dict)
    counters: int = 0
    cifar_stem: bool = False

    @property
    def branch(self) -> str:
        """Its name for `--branch`: the table and the prefix."""
        prefix = self.prefix.rstrip("./")
        return (
            f"{self.container.label}:{prefix}"
            if self.container.label and prefix
            else prefix or self.container.label or "top"
        )

    @property
    def names(self) -> set[str]:
        """All names that `--branch` accepts for it."""
        prefix = self.prefix.rstrip("./")
        return {self.branch, prefix, self.container.label, (self.container.path or ("",))[-1]} - {""}

    @property
    def rank(self) -> int:
        """Its rank in the order of preference, lowest first."""
        return preference(self.family, self.container, self.prefix.rstrip("./"))

    @cached_property
    def assessment(self) -> Architecture | str:
        """Its architecture, or the reason that it cannot be converted."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        try:
            architecture = infer_architecture({**self.foreign, **shapes}, self.cifar_stem)
        except UnsupportedArchitecture as error:
            return str(error)
        wrong = mismatches(architecture, shapes)
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return f"a {architecture.name} with wrong tensors: {'; '.join(wrong[:3])}{more}"
        return architecture


@dataclass(frozen=True)
class Selection:
    """The encoder to convert.

    Attributes:
        candidate: where it was found.
        architecture: which ResNet it is.
        dropped: number of tensors left out, by the part of the file that they belong to.
    """

    candidate: Candidate
    architecture: Architecture
    dropped: dict[str, int]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors of the architecture, by canonical name."""
        return self.candidate.tensors


def find_candidates(source: Source, cifar_stem: bool = False) -> tuple[list[Candidate], list[Container]]:
    """Every encoder in a file, best first, and every table.

    Raises:
        UserError: names are ambiguous once wrappers are removed.
    """
    metadata = tuple(f"metadata {key}={value}" for key, value in source.metadata.items())
    try:
        containers = find_containers(source.content)
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error
    found: list[Candidate] = []
    for container in containers:
        beside = replace(container, above=(*container.above, metadata))
        prefixes = [(scheme, prefix) for scheme in SCHEMES for prefix in scheme.prefixes(container.tensors)]
        if prefixes and len(found) + len(prefixes) * len(beside.surroundings) / _MOST_NAMES > _MOST_ENCODERS:
            raise UserError(
                f"{source.path} holds more encoders or other tensors than a checkpoint of a training can have"
            )
        found += [_candidate(beside, scheme, prefix, cifar_stem) for scheme, prefix in prefixes]
    return sorted(found, key=lambda candidate: candidate.rank), containers


def _candidate(container: Container, scheme: Scheme, prefix: str, cifar_stem: bool) -> Candidate:
    tensors: dict[str, StoredTensor] = {}
    foreign: dict[str, Shape] = {}
    counters = 0
    for name, tensor in container.tensors.items():
        canonical = scheme.translate(name, prefix)
        if canonical is None:
            if name.startswith(prefix):
                foreign[name[len(prefix) :]] = tensor.shape
        elif canonical.endswith(_COUNTER):
            counters += 1
        else:
            tensors[canonical] = scheme.adapt(canonical, tensor)
    if scheme is CAFFE2:
        _complete_affine_norms(tensors)
    family = find_family(container, prefix.rstrip("./"), scheme)
    return Candidate(container, prefix, scheme, family, tensors, foreign, counters, cifar_stem)


def _complete_affine_norms(tensors: dict[str, StoredTensor]) -> None:
    """Add the statistics that Caffe2's files have folded into scale and bias, as mean 0 and variance 1."""
    for name in [name for name in tensors if name.endswith(".bias")]:
        root, channels = name.removesuffix(".bias"), tensors[name].shape
        tensors.setdefault(f"{root}.running_mean", StoredTensor.of(np.zeros(channels, np.float32)))
        tensors.setdefault(f"{root}.running_var", StoredTensor.of(np.full(channels, 1 - _NORM_EPS, np.float32)))


def select(source: Source, branch: str | None = None, drop: Sequence[str] = (), cifar_stem: bool = False) -> Selection:
    """Choose the encoder to convert: the first in the order of preference, or the one called `branch`.

    Args:
        source: the file.
        branch: the name of an encoder, as `--list` shows it.
        drop: prefixes of further names to leave out, besides known heads, projectors and so on.
        cifar_stem: accept networks with a CIFAR stem, which Detectron2 does not have.

    Raises:
        UserError: there is no encoder, no supported one, none of that name, several of the same rank, or tensors beside
            it that are not known.
    """
    candidates, containers = find_candidates(source, cifar_stem)
    if not candidates:
        raise UserError(_nothing_found(source, containers))
    chosen = candidates
    if branch is not None:
        chosen = [candidate for candidate in candidates if branch in candidate.names]
        if not chosen:
            known = ", ".join(candidate.branch for candidate in candidates)
            raise UserError(f"{source.path} has no branch {branch!r}; it has: {known}")
    best = chosen[0]
    if isinstance(best.assessment, str):
        whole = [other.branch for other in candidates if not isinstance(other.assessment, str)]
        others = f" (--branch can take {' or '.join(whole)} instead)" if whole else ""
        raise UserError(f"{source.path}: under {best.branch} there is {best.assessment}{others}")
    rivals = [other for other in chosen[1:] if other.rank == best.rank and not isinstance(other.assessment, str)]
    if any(not _same(source, best, other) for other in rivals):
        names = ", ".join(candidate.branch for candidate in (best, *rivals))
        raise UserError(f"{source.path} has several encoders ({names}); choose one with --branch")
    return Selection(best, best.assessment, _account(source, best, candidates, containers, drop))


def _same(source: Source, one: Candidate, other: Candidate) -> bool:
    """Whether two encoders hold the same values; some files list one under two names."""
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(read_values(source, tensor), read_values(source, other.tensors[name]))
        for name, tensor in one.tensors.items()
    )


def _account(
    source: Source,
    best: Candidate,
    candidates: Iterable[Candidate],
    containers: Iterable[Container],
    drop: Sequence[str],
) -> dict[str, int]:
    """Count the tensors that are left out, by group. Every tensor of the encoder's own table must be known by name."""
    dropped: Counter[str] = Counter()
    if best.counters:
        dropped[_COUNTER] = best.counters
    branches = [
        other.prefix
        for other in candidates
        if other.container.path == best.container.path and other.prefix != best.prefix
    ]
    unknown = []
    for name in best.container.tensors:
        if best.scheme.translate(name, best.prefix) is not None:
            continue
        group = _group(name, best.prefix)
        branch = next((prefix for prefix in branches if prefix and name.startswith(prefix)), None)
        if branch is not None:
            dropped[branch.rstrip("./")] += 1
        elif DROPPABLE.fullmatch(group.replace("/", ".").split(".")[-1]) or name.startswith(tuple(drop)):
            dropped[group] += 1
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{source.path}: {len(unknown)} tensors beside the encoder {best.branch} are not known as a "
            f"head, a projector or the like: {', '.join(unknown[:4])}; to leave them out, give --drop the "
            "beginning of their names"
        )
    for container in containers:
        if container.path != best.container.path:
            dropped[f"{container.path[0] if container.path else 'top'} (another table)"] += len(container.tensors)
    return dict(sorted(dropped.items()))


def _group(name: str, prefix: str) -> str:
    """The part of a file that a name belongs to: what it shares with the encoder's prefix, and one part more."""
    parts, shared = (
        name.replace("/~/", "/").replace("/", ".").split("."),
        prefix.replace("/~/", "/").replace("/", ".").split("."),
    )
    depth = 0
    while depth < min(len(parts) - 1, len(shared)) and parts[depth] == shared[depth]:
        depth += 1
    if parts[depth] == "stem" and depth + 2 < len(parts):  # converters put a classifier there: `stem.fc.weight`
        depth += 1
    return ".".join(parts[: depth + 1])


def _nothing_found(source: Source, containers: Sequence[Container]) -> str:
    names = [name for container in containers for name in container.tensors]
    what = name_other_network(names[:5000])
    if what is not None:
        return f"{source.path} holds {what}, which Detectron2's ResNet is not; only ResNets can be converted"
    if not names:
        return f"{source.path} holds no tensors"
    return f"{source.path} holds {len(names)} tensors, but no ResNet; the first are {', '.join(names[:4])}"

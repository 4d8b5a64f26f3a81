"""The kinds of run that this project writes: the one table that listing and reporting read.

A run is a folder. Its kind is the `kind` of its results.json or, of a run without results, the top-level key of its
config.yaml that no other command has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import UserError
from foundation.json_files import read_json
from foundation.yaml_files import read_yaml

Keys = tuple[str, ...]
SERIES_FILES = ("seeds.json", "sweep.json")  # written by a series of detectors


@dataclass(frozen=True)
class Metric:
    """A number of results.json, with its name in tables.

    Attributes:
        path: the keys that lead to it.
    """

    title: str
    path: Keys

    @property
    def key(self) -> str:
        """The name in one word, such as `linear_top1` or `bbox/AP`: as in metrics.json and published results."""
        return "/".join(self.path[1:] if self.path[0] == "results" else self.path)

    @property
    def heading(self) -> str:
        """The title with a capital first letter, except for names that have none."""
        return self.title if self.title.startswith("kNN") else self.title[0].upper() + self.title[1:]


@dataclass(frozen=True)
class RunKind:
    """What the runs of one kind have in common.

    Attributes:
        name: the `kind` in results.json.
        title: of its section in a report.
        command: that makes it.
        config_key: the top-level key of config.yaml that only this kind has; empty if it writes no config.yaml.
        last_file: the file with which a run is complete.
        conditions: paths of the values that must be equal for two runs to be compared; in results.json, or for
            pretraining in config.yaml.
        wording: for each of the conditions, how its value is put into the name of what is compared.
        metrics: what it measures; empty where this depends on the run.
        headline: the metrics that a report's sentences are about.
        is_collection: whether the runs themselves are in folders below.
    """

    name: str
    title: str
    command: str
    config_key: str = ""
    last_file: str = "results.json"
    conditions: tuple[Keys, ...] = ()
    wording: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    headline: tuple[Metric, ...] = ()
    is_collection: bool = False


_LINEAR, _KNN, _TOP1, _MAP = (
    Metric("linear top-1", ("linear_top1",)),
    Metric("kNN top-1", ("knn_top1",)),
    Metric("top-1", ("top1",)),
    Metric("VOC07 mAP", ("map",)),
)
PRETRAIN, DETECTION, SERIES = "pretrain", "detection", "series"
EVALUATED_WITH = "evaluated_with"  # in results.json: the keys of the last evaluation that differ from config.yaml
KINDS: Mapping[str, RunKind] = {
    kind.name: kind
    for kind in (
        RunKind(
            PRETRAIN,
            "Pretraining",
            "pretrain/train.py",
            config_key="OBJECTIVE",
            last_file="encoder.safetensors",
            conditions=(("ENCODER.NAME",), ("DATA.NAME",)),
            wording=("{}", " on {}"),
        ),
        RunKind(
            "linear",
            "Frozen encoder",
            "pretrain/linear.py",
            config_key="LINEAR",
            conditions=(("config",), ("dataset",), ("k",)),
            wording=("{}", " on {}", ", kNN with k = {}"),
            metrics=(
                _LINEAR,
                Metric("linear top-5", ("linear_top5",)),
                Metric("linear top-1, best epoch", ("linear_best_top1",)),
                _KNN,
                Metric("kNN top-5", ("knn_top5",)),
            ),
            headline=(_LINEAR, _KNN),
        ),
        RunKind(
            "finetune",
            "Fine-tuning with labels",
            "pretrain/finetune.py",
            config_key="FINETUNE",
            conditions=(("config",), ("dataset",), ("fraction",), ("images",)),
            wording=("{}", " on {}", ", {} of the labels", " ({} images)"),
            metrics=(_TOP1, Metric("top-5", ("top5",)), Metric("top-1, best epoch", ("best_top1",))),
            headline=(_TOP1,),
        ),
        RunKind(
            "transfer",
            "Frozen encoder on other images",
            "pretrain/transfer.py",
            conditions=(("encoder",), ("data",), ("image_size",), ("stem",)),
            wording=("{}", " on {}", ", {} pixels", ", {} stem"),
            metrics=(_TOP1, _MAP),
            headline=(_TOP1, _MAP),
        ),
        RunKind(
            DETECTION,
            "Detection and segmentation",
            "detection/train_net.py",
            config_key="SOLVER",
            conditions=(("config",), ("train_images",), ("iterations",), ("dataset", "name")),
            wording=("{}", " on {} images", ", {} iterations", ", evaluated on {}"),
        ),
        RunKind("sweep", "Sweep of pretraining", "pretrain/sweep.py", is_collection=True),
        RunKind(SERIES, "Series of detectors", "detection/train_net.py", is_collection=True),
    )
}


def identify(folder: Path) -> RunKind | None:
    """The kind of the run in a folder; None if it is not a run, or not of a known kind."""
    for name in ("results.json", *SERIES_FILES):
        kind = read_results(folder, name).get("kind")
        if isinstance(kind, str) and kind in KINDS:
            return KINDS[kind]
    return kind_of_config(read_config(folder))


def kind_of_config(config: Mapping[str, Any]) -> RunKind | None:
    """The kind of the run that has a config; None if it is not of a known kind."""
    return next((kind for kind in KINDS.values() if kind.config_key and kind.config_key in config), None)


def refuse_other_kind(folder: Path, kind: str) -> None:
    """See that a folder is not that of another command's run, whose config and records would be overwritten.

    Args:
        folder: to write a run to; it need not exist.
        kind: of that run. A detector may share the folder with a series of detectors.

    Raises:
        UserError: it is.
    """
    found = identify(folder)
    if found is not None and found.name != kind and (found.name, kind) != (SERIES, DETECTION):
        raise UserError(f"{folder} holds a run of {found.command}: choose another --output")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a run's config.yaml as nested dictionaries; empty if there is none or it is damaged."""
    try:
        content = read_yaml(folder / "config.yaml")
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def read_results(folder: Path, name: str = "results.json") -> dict[str, Any]:
    """The content of a run's results.json or another JSON file; empty if there is none or it is damaged."""
    try:
        content = read_json(folder / name)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

"""What a run ends with: `results.json`, its main results in a line, and the comparison with those expected."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from fvcore.common.config import CfgNode

from detection.data import datasets
from detection.training import checkpoints, run_folder, summary, weights
from detection.training.hooks import check_expected
from foundation.errors import UserError

PREDICTIONS = "predictions"  # folder in the run's
OF_AVERAGE = "predictions_EMA"  # the same for the average of the weights
logger = logging.getLogger(__name__)


def record(
    config: CfgNode,
    name: str,
    results: dict[str, Any],
    *,
    iterations: int,
    train_images: int,
    stopped_early: bool = False,
    best: dict[str, Any] | None = None,
) -> None:
    """Write `results.json`: what a report needs, besides the files that Detectron2 writes."""
    path = config.MODEL.WEIGHTS
    try:
        sidecar = weights.describe(Path(path)) if path else {}
    except UserError as error:  # the file has been replaced since; the results count all the same
        logger.warning("%s: what trained the weights is not known any more", error)
        sidecar = {}
    target = Path(config.OUTPUT_DIR) / "results.json"
    content = {
        "kind": "detection",
        "config": name,
        "weights": path,
        "init": sidecar.get("trained_by", Path(path).stem) if path else "random",
        "seed": config.SEED,
        "iterations": iterations,
        "train_images": train_images,
        "config_sha256": run_folder.digest(config),
        **describe(config, results),
    }
    content |= {"stopped_early": True} if stopped_early else {}
    content |= {"best": {**best, "weights": checkpoints.BEST}} if best else {}
    run_folder.write_json(target, content)
    logger.info("Results are in %s", target)
    conclude(config, results)


def describe(config: CfgNode, results: Mapping[str, Any]) -> dict[str, Any]:
    """What was evaluated on and the results, as `results.json` has them: `dataset` and `results` of the first dataset,
    and `evaluations` of the others, with the folders of their predictions.
    """
    entries = [
        {
            "dataset": {"name": name, **datasets.sources(name)},
            "predictions": f"{PREDICTIONS}_{label}",
            "results": _of_dataset(results, label),
        }
        for name, label in zip(config.DATASETS.TEST, ("", *datasets.labels(config.DATASETS.TEST)[1:]), strict=True)
    ]
    first = {key: entries[0][key] for key in ("dataset", "results")}
    return first | ({"evaluations": entries[1:]} if entries[1:] else {})


def predictions_of(weights: Path) -> Path:
    """The folder of the results on the first dataset of the weights of a run; those of the average have their own."""
    return weights.parent / (OF_AVERAGE if weights.name == checkpoints.AVERAGE else PREDICTIONS)


def _of_dataset(results: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The results by task of one dataset; the label of the first is empty."""
    return {task.rpartition("/")[2]: metrics for task, metrics in results.items() if task.rpartition("/")[0] == label}


def conclude(config: CfgNode, results: dict[str, Any]) -> None:
    """Print the main results of each dataset in a line, and the command that tells more; compare the results with those
    expected, if the config has any.
    """
    print()
    labels = datasets.labels(config.DATASETS.TEST)
    for name, label in zip(config.DATASETS.TEST, ("", *labels[1:]), strict=True):
        line = summary.describe(_of_dataset(results, label), len(DatasetCatalog.get(name)))
        print(line if len(labels) == 1 else f"{label or labels[0]}: {line}")
    folder = shlex.quote(config.OUTPUT_DIR)
    print(f"tables, curves and pictures: python detection/report.py {folder} --output {folder}/report", flush=True)
    check_expected(results, config.TEST.EXPECTED_RESULTS)

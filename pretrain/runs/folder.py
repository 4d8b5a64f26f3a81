"""A run folder: used by one process at a time, with the configuration of its run, and its results."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from foundation import locks
from foundation.config import RECIPE, RUN_CONFIG, keys, value_of
from foundation.errors import UserError
from foundation.files import check_utf8, check_writable, write_atomic
from foundation.json_files import read_json
from foundation.run_kinds import kind_of_config, refuse_other_kind
from pretrain.distributed import group
from pretrain.runs import checkpoint
from pretrain.runs.metrics import start_logging

# Keys that may differ from those of the interrupted run, because they do not change what is computed.
MAY_CHANGE = {
    "DATA.ROOT",
    "DATA.CACHE",
    "DATA.CACHE_GB",
    "DATA.WORKERS",
    "DATA.MAX_UNREADABLE",
    "DATA.WORKER_TIMEOUT",
    "TRAIN.CUDA_GRAPH",
    "TRAIN.MAX_SKIPPED",
    "TRAIN.PEER_TIMEOUT",
    "CHECKPOINT.MINUTES",
    "CHECKPOINT.STEPS",
    "LOG.PERIOD",
    "LOG.WANDB",
    "TRAIN.MAX_STEPS",
    "PROBE.EVERY",
    "PROBE.K",
    "PROBE.KIND",
    "PROBE.MAX_TRAIN",
    "PROBE.ROOT",
}
# Keys that checkpoints of earlier versions do not have, with the value that has the effect of those versions.
BEFORE = {
    "AUGMENT.REGION": [1.0, 1.0],
    "DATA.DECODE": "exact",
    "DATA.INTERPOLATION": "bicubic",
    "DATA.WINDOW": 0,
    "ENCODER.ZERO_INIT_RESIDUAL": False,
    "ENCODER.WEIGHTS": "",
    "LINEAR.INIT": "normal",
    "PROJECTOR.NORM": True,
    "PROJECTOR.LAST_BIAS": True,
    "TRAIN.DROP_LAST": True,
    "TRAIN.LR_PER_256": 0.0,
    "TRAIN.OPTIMIZER": "sgd",
}
OUTCOME = ("encoder.safetensors", "results.json")  # what a run writes at its end
logger = logging.getLogger("pretrain")


def refuse_begun(output: Path, config: CfgNode, resume: bool = False) -> None:
    """See that a run can be written, and does not replace another one.

    Raises:
        UserError: the folder cannot be written; it holds checkpoints, and they are not to be resumed from; or the run
            of another command.
    """
    check_writable(output)
    if not checkpoint.exists(output):
        kind = kind_of_config(config)
        if kind is not None:
            refuse_other_kind(output, kind.name)
    elif not resume:
        raise UserError(
            f"{output} holds the checkpoints of a run; add --resume to continue it, or choose another --output"
        )


def open_run(output: Path, config: CfgNode, resume: bool, recipe: str = "") -> dict[str, Any] | None:
    """Create or re-open a run folder: lock it, start its log, write config.yaml.

    Args:
        output: the folder.
        config: of the run.
        resume: whether to continue from its last checkpoint.
        recipe: the name for the first line of config.yaml, where `foundation.config.recipe_name` finds it; empty: none.

    Returns:
        The checkpoint to continue from, or None to start.

    Raises:
        UserError: another process uses it; it holds checkpoints and `resume` is off, or the run of another command; it
            cannot be written; or the configuration differs from that of the checkpoint in a key that changes the
            result.
    """
    refuse_begun(output, config, resume)
    if group.is_main():
        check_utf8(output)
        locks.hold(output)
        try:
            checkpoint.finish_save(output)
        except OSError as error:
            raise UserError(f"cannot write the run folder {output}: {error}") from error
    start_logging(output if group.is_main() else None)
    state = checkpoint.load_newest(output) if resume else None
    if state:
        _compare(config, state["config"], output)
        logger.info("resuming after epoch %d, step %d", state["position"]["epoch"], state["position"]["step"])
    elif resume:
        logger.info("nothing to resume in %s: starting a new run", output)
    if group.is_main():
        first = f"{RECIPE}{recipe}\n" if recipe else ""
        write_atomic(output / RUN_CONFIG, (first + yaml.safe_dump(plain(config), sort_keys=False)).encode())
    return state


def withdraw_outcome(run: Path) -> None:
    """Remove the final files of a complete run that continues from a checkpoint to a later end.

    Otherwise the run would look complete until then, and readers of its weights would take the earlier ones, which the
    checkpoint holds too. A run that starts again from the beginning keeps the files until its end.
    """
    for name in OUTCOME:
        (run / name).unlink(missing_ok=True)


def with_earlier_values(defaults: CfgNode, config: str) -> CfgNode:
    """The defaults under a configuration file: if it is a run's own config.yaml, keys that it lacks keep their meaning.

    Such a key is newer than the run; it gets the value that has the effect of the version that wrote the file.

    Args:
        defaults: of this version.
        config: name or path of the configuration file.
    """
    if folder_of(config):
        known = set(keys(defaults))
        for key, value in BEFORE.items():
            if key in known:
                defaults.merge_from_list([key, value])
    return defaults


def folder_of(config: str) -> Path | None:
    """The run folder that a configuration file lies in as the run's own config.yaml; None: it is no run's."""
    path = Path(config)
    return path.parent if path.name == RUN_CONFIG and (path.parent / "metrics.json").is_file() else None


def plain(config: CfgNode) -> dict[str, Any]:
    """A configuration as nested dictionaries."""
    return {key: plain(value) if isinstance(value, CfgNode) else value for key, value in config.items()}


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Write a run's results.json."""
    write_atomic(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())


def read_results(run: Path) -> dict[str, Any] | None:
    """A run's results, or None where it has none yet. Raises UserError where the file is damaged."""
    path = run / "results.json"
    if not path.is_file():
        return None
    try:
        results = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; run the evaluation again") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} is damaged: it is not an object; run the evaluation again")
    return results


def _compare(config: CfgNode, saved: dict[str, Any], output: Path) -> None:
    old, new = ({key: value_of(c, key) for key in keys(c)} for c in (CfgNode(saved), config))
    old = BEFORE | old
    changed = [key for key in new if key not in MAY_CHANGE and old.get(key) != new[key]]
    if changed:
        listed = "; ".join(f"{key}: {old.get(key)!r} then, {new[key]!r} now" for key in changed)
        raise UserError(
            f"cannot resume {output} with another configuration ({listed}); --config {output}/config.yaml keeps that "
            "run's own, or choose another --output"
        )

"""The files of a run besides its checkpoints: the config, the log, the records and `results.json`."""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.config import CfgNode

from detection import config as configs
from foundation.config import RECIPE, RUN_CONFIG, keys, value_of
from foundation.errors import UserError
from foundation.files import write_atomic
from foundation.json_files import read_json, read_json_lines
from foundation.run_kinds import EVALUATED_WITH, read_results

LOGGERS = ("detectron2", "fvcore", "detection")
RECORDS = "metrics.json"
TASKS = ("bbox", "segm", "keypoints", "sem_seg")  # results are records named TASK/METRIC
# Keys of the machine and of what is kept on disk: the results of a finished run do not depend on them.
WITHOUT_EFFECT = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "VIS_PERIOD", "CUDNN_BENCHMARK", "LOG."),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.KEEP_CHECKPOINTS", "SOLVER.ACCUMULATION"),
)
# Keys that earlier versions did not have: with their defaults, a run's digest is still that of an earlier version.
LATER = ("INPUT.LSJ.", "SOLVER.EMA", "SOLVER.LAYER_DECAY", "SOLVER.OPTIMIZER", "TEST.BEST_METRIC", "TEST.PATIENCE")
CLASSES = "DATASETS.CLASSES"  # follows from the training set, and earlier versions did not note it
# Keys that may differ when a run is continued: those, its length, and what does not affect the training.
MAY_CHANGE = (
    *WITHOUT_EFFECT,
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "DATASETS.TEST", "TEST.", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
)
OF_EVALUATION = ("TEST.", "INPUT.", "MODEL.", "DATASETS.TEST", "SOLVER.PRECISION", "FLOAT32_PRECISION")


def start_logging(folder: Path, rank: int) -> None:
    """Log to `log.txt` in full, and in the first process to the terminal without the long tables.

    A second call replaces the handlers of the first, so that several runs in one process do not log twice.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [logging.FileHandler(folder / name)]
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror or error}") from error
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[1].setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%m/%d %H:%M:%S"))
    for logger in map(logging.getLogger, LOGGERS):
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)


class RecordWriter(EventWriter):
    """Appends records to `metrics.json`, in Detectron2's format: one JSON object a line, of one iteration.

    Args:
        folder: of the run.
        first: the iteration at which the run begins or is resumed. Records from it on, which an interrupted run has
            left, are removed, because they come again.
        window: iterations; the record of a loss is the median of as many values.
        mirrors: functions of (iteration, values) that get the records too.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(
        self, folder: Path, first: int, window: int, mirrors: Sequence[Callable[[int, Mapping[str, Any]], None]] = ()
    ) -> None:
        self._path, self._window, self._mirrors = folder / RECORDS, window, mirrors
        kept = [record for record in read_records(folder) if record["iteration"] < first]
        self._written = {name: record["iteration"] for record in kept for name in record}
        try:
            write_atomic(self._path, "".join(_line(record) for record in kept).encode())
            self._file = self._path.open("a")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def write(self) -> None:
        """Append what has come since it was last called, and have it on the disk.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        records: dict[int, dict[str, Any]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if iteration > self._written.get(name, -1):
                records.setdefault(iteration, {})[name] = value
                self._written[name] = iteration
        try:
            for iteration in sorted(records):
                self._file.write(_line({**records[iteration], "iteration": iteration}))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror or error}; the last checkpoint is intact, --resume"
                " continues from there"
            ) from error
        for mirror in self._mirrors:
            for iteration in sorted(records):
                mirror(iteration, records[iteration])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; lines that are damaged are left out, with a warning.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / RECORDS
    records = read_json_lines(path) if path.exists() else []
    return [record for record in records if type(record.get("iteration")) is int]


def is_evaluated(folder: Path, iteration: int) -> bool:
    """Whether the records have an evaluation after an iteration."""
    prefixes = tuple(f"{task}/" for task in TASKS)
    return any(
        record["iteration"] == iteration and any(name.startswith(prefixes) for name in record)
        for record in read_records(folder)
    )


def write_config(folder: Path, config: CfgNode, recipe: str) -> None:
    """Write the recipe's name and every key to `config.yaml`, from which the same run can be started again.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    path = folder / RUN_CONFIG
    try:
        write_atomic(path, f"{RECIPE}{recipe}\n{config.dump()}".encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_same(folder: Path, config: CfgNode) -> None:
    """Check that a run is continued with the config that it was begun with.

    Raises:
        UserError: a key differs that would make it another run.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        return
    before, now = _with_lists(configs.load(str(path))), _with_lists(config)
    changed = [
        f"{key} ({_value(before, key)!r} then, {_value(now, key)!r} now)"
        for key in keys(now)
        if not (key.startswith(MAY_CHANGE) or (key == CLASSES and not _value(before, key)))
        and _value(before, key) != _value(now, key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another config: {', '.join(changed)}; give the same values again,"
            " or choose another --output"
        )


def digest(config: CfgNode) -> str:
    """SHA-256 of the values that a run's results depend on."""
    defaults = configs.default_config()
    values = {
        key: _value(config, key)
        for key in keys(config)
        if not key.startswith((*WITHOUT_EFFECT, CLASSES))
        and not (key.startswith(LATER) and _value(config, key) == _value(defaults, key))
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_finished(config: CfgNode) -> bool:
    """Whether the folder has the results of this config, so that there is nothing left to do.

    Raises:
        UserError: it has the results of another config.
    """
    folder = Path(config.OUTPUT_DIR)
    found = read_results(folder)
    if not found:
        return False
    check_same(folder, config)
    ended = found.get("iterations") == config.SOLVER.MAX_ITER or found.get("stopped_early") is True
    return ended and found.get("config_sha256") == digest(config)


def has_ended_early(folder: Path, iterations: int) -> bool:
    """Whether the results are those of a training that has ended after so many iterations because nothing improved."""
    found = read_results(folder)
    return found.get("stopped_early") is True and found.get("iterations") == iterations


def replace_results(config: CfgNode, evaluated: Mapping[str, Any]) -> None:
    """Replace datasets and metrics in the `results.json` of a finished run; an unfinished one has none.

    Keys of the evaluation that are not as in the run's config.yaml are noted in it, as `evaluated_with`.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(config.OUTPUT_DIR) / "results.json"
    if not path.is_file():
        return
    try:
        record = read_json(path)
        if not isinstance(record, dict):
            raise UserError(f"{path} is damaged: it holds no object")
    except UserError as error:
        raise UserError(f"{error}; train with --resume, which evaluates and writes it anew") from error
    for replaced in ("evaluations", EVALUATED_WITH):
        record.pop(replaced, None)
    differing = _differing_evaluation(path.parent, config)
    noted = {EVALUATED_WITH: differing} if differing else {}
    write_json(path, {**record, "config_sha256": digest(config), **evaluated, **noted})


def _differing_evaluation(folder: Path, config: CfgNode) -> dict[str, Any]:
    """The values of a config that an evaluation depends on and that are not those of the run's config.yaml."""
    try:
        begun = _with_lists(configs.load(str(folder / RUN_CONFIG)))
    except UserError:  # without it there is nothing that they could contradict
        return {}
    now = _with_lists(config)
    return {
        key: value_of(now, key)
        for key in keys(now)
        if key.startswith(OF_EVALUATION)
        and not key.startswith((*WITHOUT_EFFECT, "MODEL.WEIGHTS"))
        and _value(now, key) != _value(begun, key)
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file of JSON. Numbers that are not finite become null, which JSON knows.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        write_atomic(path, (json.dumps(_plain(content), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _with_lists(config: CfgNode) -> CfgNode:
    """A config as it is read from YAML, where tuples are lists."""
    return CfgNode(yaml.safe_load(config.dump()))


def _value(config: CfgNode, key: str) -> Any:
    value = value_of(config, key)
    # With one process the two are the same, and a run may continue with another number of processes.
    return "BN" if key.endswith("NORM") and value in configs.SYNCHRONISED else value

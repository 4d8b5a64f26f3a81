"""What a run leaves behind besides Detectron2's own files: the config, the log and `results.json`."""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cli.errors import UserError

LOGGERS = ("detectron2", "fvcore", "detection")


def start_logging(folder: Path, rank: int) -> None:
    """Send the log to `log.txt` in full, and from the first process to the terminal without the long tables.

    A second call replaces the destinations of the first, so that runs in one process do not write twice.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [logging.FileHandler(folder / name)]
    except OSError as error:
        raise UserError(f"the run cannot be kept in {folder}: {error.strerror or error}") from error
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


def write_config(folder: Path, config: CfgNode) -> None:
    """Write every key and value to `config.yaml`, from which the same run can be started again."""
    _write(folder / "config.yaml", config.dump())


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`. Averages over nothing (NaN) become null, which JSON knows."""
    _write(folder / "results.json", json.dumps(_plain(results), indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, text: str) -> None:
    """All of it or nothing: a reader never sees half a file."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text)
    os.replace(draft, path)

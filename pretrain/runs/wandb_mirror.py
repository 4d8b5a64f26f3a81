"""Weights & Biases, for those who use it: the lines of metrics.json, sent there too. Nothing depends on it."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from foundation.errors import UserError


def open_wandb(project: str, run: Path, config: Mapping[str, Any]) -> Callable[[int, Mapping[str, float]], None]:
    """A mirror of the record, called with (step, values). A resumed run goes on in the same place.

    Args:
        project: of Weights & Biases.
        run: the run's directory; its path tells this run from others.
        config: shown with the run.

    Raises:
        UserError: the library is not installed, or refuses.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("LOG.WANDB needs the library wandb: pip install wandb, or leave LOG.WANDB empty") from error
    try:
        session = wandb.init(
            project=project,
            id=sha256(str(run.resolve()).encode()).hexdigest()[:16],
            name=run.name,
            dir=str(run),
            config=dict(config),
            resume="allow",
        )
    except Exception as error:  # not logged in, no network: the library has a class for each
        raise UserError(f"LOG.WANDB: Weights & Biases refuses ({error}); leave LOG.WANDB empty to go on") from error
    return lambda step, values: session.log(dict(values), step=step)

"""The optional mirror of a run's records at Weights & Biases (`LOG.WANDB`)."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from foundation.errors import UserError


def require_wandb() -> None:
    """Raises UserError where the library is not installed: before a run writes files."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise UserError("LOG.WANDB needs the library wandb: pip install wandb, or leave LOG.WANDB empty") from error


def open_wandb(project: str, run: Path, config: Mapping[str, Any]) -> Callable[[int, Mapping[str, Any]], None]:
    """Send the records of a run to Weights & Biases too. Returns a function of (step, values).

    Values are numbers and pictures (Pillow's).

    A resumed run continues the same record there.

    Args:
        project: at Weights & Biases.
        run: the run folder; its path identifies the run.
        config: shown with the run.

    Raises:
        UserError: the library is not installed, or Weights & Biases refuses.
    """
    require_wandb()
    import wandb

    try:
        session = wandb.init(
            project=project,
            id=sha256(str(run.resolve()).encode()).hexdigest()[:16],
            name=run.name,
            dir=str(run),
            config=dict(config),
            resume="allow",
            reinit=True,  # a series makes several runs in one process
        )
    except Exception as error:  # not logged in, no network: the library has a class for each
        raise UserError(
            f"LOG.WANDB: Weights & Biases refuses ({error}); leave LOG.WANDB empty to continue without it"
        ) from error

    def send(step: int, values: Mapping[str, Any]) -> None:
        pictures = {name: wandb.Image(value) for name, value in values.items() if isinstance(value, Image.Image)}
        session.log({**values, **pictures}, step=step)

    return send

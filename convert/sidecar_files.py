"""Where the sidecar of a file of weights lies, and reading it; `convert.sidecar` lists its fields."""

from pathlib import Path
from typing import Any

from foundation.errors import UserError
from foundation.files import sha256_of
from foundation.json_files import read_json


def sidecar_path(weights: Path) -> Path:
    """`NAME.json` for `NAME.pkl`, Detectron2's weights; `NAME.pth.json` for `NAME.pth`."""
    return weights.with_suffix(".json") if weights.suffix == ".pkl" else weights.with_name(f"{weights.name}.json")


def read_sidecar(weights: Path, check: bool = True) -> dict[str, Any]:
    """The sidecar of a file of weights; empty if there is none.

    Args:
        weights: the file.
        check: compare the digest that the sidecar has of it.

    Raises:
        UserError: it is not a JSON object, or belongs to other weights.
    """
    path = sidecar_path(weights)
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; convert the weights again")
    digest = content.get("weights_sha256")
    try:
        if check and digest is not None and digest != sha256_of(weights):
            raise UserError(
                f"{path} does not belong to {weights}, which is damaged, was replaced, or was being converted when the "
                "converter was killed; convert it again with --overwrite"
            )
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror or error}") from error
    return content

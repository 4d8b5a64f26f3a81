"""Labels of semantic segmentation: images whose values are classes."""

from pathlib import Path

import numpy
from PIL import Image

from foundation.errors import UserError


def read_labels(path: Path) -> numpy.ndarray:
    """The labels of a file as they are: of an image with a palette its indices, not its colours.

    Returns:
        (H, W), or (H, W, C) where the file has several channels.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            return numpy.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image of labels: {error}") from error


def check_labels(values: numpy.ndarray, path: Path, classes: int, ignored: int) -> None:
    """See that each pixel's label is a class or the ignored one.

    Args:
        values: (H, W) labels.
        path: of the file, for the message.
        classes: labels must be below this.
        ignored: the label of pixels that do not count.

    Raises:
        UserError: they are not.
    """
    if values.ndim != 2:
        raise UserError(f"{path} has {values.ndim} dimensions: labels must be an image with one channel or a palette")
    wrong = values[(values >= classes) & (values != ignored)]
    if wrong.size:
        right = f"labels must be 0 to {classes - 1}, or {ignored} to be ignored"
        raise UserError(f"{path} has the label {wrong[0]}: {right}")

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


def to_resizable(values: numpy.ndarray) -> numpy.ndarray:
    """Labels of at most 16 bits, as a type that Detectron2 resizes: uint8 where they fit, else float32, exactly.

    It cannot resize those of a 16-bit or 1-bit file as they are.
    """
    return values.astype(numpy.uint8 if values.max(initial=0) <= numpy.iinfo(numpy.uint8).max else numpy.float32)


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
    wrong = values[((values < 0) | (values >= classes)) & (values != ignored)]
    if wrong.size:
        right = f"labels must be 0 to {classes - 1}, or {ignored} to be ignored"
        raise UserError(f"{path} has the label {wrong[0]}: {right}")

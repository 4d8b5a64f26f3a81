"""Packages that the readers and evaluations of some datasets import besides Detectron2.

This project does not depend on them: they are needed with these datasets only, and reported as missing before a run.
"""

import importlib
import sys
import types
from collections.abc import Sequence

import numpy

from foundation.errors import UserError


def provide_lvis(dataset: str) -> None:
    """Make `import lvis` work, also where OpenCV does not load: only the drawing module of `lvis` uses it.

    The `opencv-python` that `lvis` depends on needs libraries of a desktop, which servers lack.

    Raises:
        UserError: the package does not load; names `dataset`, which needs it.
    """
    try:
        importlib.import_module("cv2")
    except ImportError:
        stand_in = types.ModuleType("lvis.vis", "Not loaded, because OpenCV does not load.")
        stand_in.LVISVis = None  # type: ignore[attr-defined]
        sys.modules.setdefault(stand_in.__name__, stand_in)
    _require(["lvis"], "lvis", dataset)


def provide_cityscapes(dataset: str) -> None:
    """See that the packages that read and evaluate Cityscapes are installed, and make them work with this NumPy.

    Raises:
        UserError: a package does not load; names `dataset`, which needs it.
    """
    if not hasattr(numpy, "in1d"):
        # Removed in NumPy 2.4; the evaluation scripts reshape what it gives, so that its successor serves as well.
        numpy.in1d = numpy.isin  # type: ignore[attr-defined]
    _require(["cityscapesscripts.helpers.csHelpers", "shapely.geometry"], "cityscapesscripts shapely", dataset)


def _require(modules: Sequence[str], distributions: str, dataset: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"dataset {dataset} needs `pip install {distributions}`: {error}") from error

"""Packages that the readers and evaluations of some datasets import besides Detectron2.

They are no dependency of this project: whoever uses the dataset installs them, and is told so before a run.
"""

import importlib
import importlib.util
import sys
import types

from cli.errors import UserError

# (module, distribution) of each
LVIS = (("lvis", "lvis"),)
CITYSCAPES = (("cityscapesscripts", "cityscapesscripts"), ("shapely", "shapely"))


def provide_lvis(dataset: str) -> None:
    """Make `import lvis` work, also where OpenCV does not load: only the drawing module of `lvis` uses it.

    The `opencv-python` that `lvis` depends on wants libraries of a desktop, which servers lack.

    Raises:
        UserError: the package is not installed; names `dataset`, which needs it.
    """
    _require(LVIS, dataset)
    try:
        importlib.import_module("cv2")
    except ImportError:
        stand_in = types.ModuleType("lvis.vis", "Not loaded: there is no OpenCV that works.")
        stand_in.LVISVis = None  # type: ignore[attr-defined]
        sys.modules.setdefault("lvis.vis", stand_in)


def provide_cityscapes(dataset: str) -> None:
    """See that what reads and evaluates Cityscapes is there.

    Raises:
        UserError: a package is not installed; names `dataset`, which needs it.
    """
    _require(CITYSCAPES, dataset)


def _require(packages: tuple[tuple[str, str], ...], dataset: str) -> None:
    missing = [name for module, name in packages if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"dataset {dataset} needs {' and '.join(missing)}: pip install {' '.join(missing)}")

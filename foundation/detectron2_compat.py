"""What Detectron2's release v0.6 (2021) needs on today's libraries. Import this before `detectron2`.

Each part looks for the feature that is missing, not for a version: upstream's main branch calls itself 0.6
too and needs none of this, and is left as it is, but for one message in its log.

Raises at import:
    UserError: there is no Detectron2.
"""

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
from torch.optim import lr_scheduler

from foundation.errors import UserError

logger = logging.getLogger(__name__)


class MissingOperators(types.ModuleType):
    """Stands in for the compiled module `detectron2._C`, which five modules of the tree import unguarded.

    ROIAlign and NMS are torchvision's. What only the compiled module has, deformable convolution on CUDA and
    rotated boxes, raises AttributeError when it is called.

    Args:
        reason: why it is missing.
    """

    def __init__(self, reason: str = "Detectron2 is installed without its C++ operators") -> None:
        super().__init__("detectron2._C", self.__doc__)
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"detectron2._C.{name} is not there: {self._reason};"
            " build Detectron2 from source if the model needs deformable convolution on CUDA or rotated boxes"
        )

    def get_compiler_version(self) -> str:
        """For the table of the environment, which every run logs."""
        return f"none: {self._reason}"

    get_cuda_version = get_compiler_version

    @staticmethod
    def has_cuda() -> bool:
        """False: there is no library file whose GPU architectures could be listed."""
        return False


def restore_removed_names() -> None:
    """Put back the names that the tree uses and that libraries have removed."""
    if not hasattr(PIL.Image, "LINEAR"):
        # A default argument in data/transforms/transform.py; removed in Pillow 10.
        PIL.Image.LINEAR = PIL.Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    for alias in (bool, int, float, str):
        # Removed in NumPy 1.24 (`bool` came back in 2.0 with another meaning, which serves as a dtype as
        # well). masks.py and visualizer.py use bool; the semantic evaluator int and float; pascal_voc.py str.
        # The class histogram of a training set (int) swallows the error and would just not appear.
        if alias.__name__ not in vars(numpy):
            setattr(numpy, alias.__name__, alias)
    if getattr(lr_scheduler, "_LRScheduler", None) is not lr_scheduler.LRScheduler:
        # The hook that puts the schedule into a checkpoint tests for the old base class, from which torch's
        # own schedulers do not derive since 2.0: their state would silently not be saved.
        lr_scheduler._LRScheduler = lr_scheduler.LRScheduler  # type: ignore[misc, assignment]


def silence_known_warnings() -> None:
    """Two deprecations that the tree cannot escape, each of which would head every run's output."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", category=UserWarning)


def silence_diverged_losses() -> None:
    """Main logs the traceback of a loss that is not finite, which a run says in one line."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_diverged_loss)


def _is_no_diverged_loss(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], FloatingPointError))


def provide_operators() -> None:
    """Give the tree a `detectron2._C` if it has none that loads."""
    try:
        importlib.import_module("detectron2._C")
        return
    except ModuleNotFoundError:
        stand_in = MissingOperators()
    except ImportError as error:
        stand_in = MissingOperators(f"it does not load ({error})")
        logger.warning(
            "Detectron2's C++ operators do not load, and are done without: build Detectron2 again if PyTorch has been"
            " replaced since (%s)",
            error,
        )
    sys.modules["detectron2._C"] = stand_in
    sys.modules["detectron2"]._C = stand_in  # type: ignore[attr-defined]


def provide_fast_evaluation() -> None:
    """Make the compiled COCO evaluation fall back to pycocotools where it is missing.

    `evaluation/coco_evaluation.py` imports it unguarded in v0.6, and takes it unless told otherwise.
    """
    if not isinstance(sys.modules["detectron2._C"], MissingOperators):
        return
    cocoeval = importlib.import_module("pycocotools.cocoeval")
    fallback = types.ModuleType("detectron2.evaluation.fast_eval_api")
    fallback.COCOeval_opt = cocoeval.COCOeval  # type: ignore[attr-defined]
    sys.modules[fallback.__name__] = fallback


def provide_resource_names() -> None:
    """`model_zoo` finds its configs by `pkg_resources`, which setuptools 81 removed.

    The stand-in is there only while `model_zoo` is imported, because other libraries probe for the real one.
    """
    if importlib.util.find_spec("pkg_resources") is not None:
        return

    def resource_filename(package: str, name: str) -> str:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        return str(folder / name)

    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        importlib.import_module("detectron2.model_zoo.model_zoo")
    finally:
        del sys.modules["pkg_resources"]


def prepare() -> None:
    """All of it, in the order in which Detectron2's modules would trip over it.

    Raises:
        UserError: there is no Detectron2.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise UserError("Detectron2 is not installed: run `python -m detection.install`")
    restore_removed_names()
    silence_known_warnings()
    silence_diverged_losses()
    provide_operators()
    provide_fast_evaluation()
    provide_resource_names()


prepare()

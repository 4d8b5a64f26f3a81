"""What Detectron2's release v0.6 (2021) needs to run on current libraries. Import this before `detectron2`.

Each part tests for the missing feature, not for a version: upstream's main branch also has the version 0.6 and needs
none of this; only one of its log messages is changed.

Raises at import:
    UserError: Detectron2 is not installed.
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
    """Replaces the compiled module `detectron2._C`, which five modules of Detectron2 import unconditionally.

    ROIAlign and NMS come from torchvision. Operators that only the compiled module has (deformable convolution on
    CUDA, rotated boxes) raise AttributeError when they are called.

    Args:
        reason: why the module is missing.
    """

    def __init__(self, reason: str = "Detectron2 is installed without its C++ operators") -> None:
        super().__init__("detectron2._C", self.__doc__)
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"detectron2._C.{name} is missing: {self._reason};"
            " build Detectron2 from source if the model needs deformable convolution on CUDA or rotated boxes"
        )

    def get_compiler_version(self) -> str:
        """Shown in the table of the environment, which every run logs."""
        return f"none: {self._reason}"

    get_cuda_version = get_compiler_version

    @staticmethod
    def has_cuda() -> bool:
        """False: no library file exists whose GPU architectures could be listed."""
        return False


def restore_removed_names() -> None:
    """Restore names that Detectron2 uses and newer libraries have removed."""
    if not hasattr(PIL.Image, "LINEAR"):
        # A default argument in data/transforms/transform.py; removed in Pillow 10.
        PIL.Image.LINEAR = PIL.Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    for alias in (bool, int, float, str):
        # Removed in NumPy 1.24 (`bool` returned in 2.0 with another meaning, which also works as a dtype).
        # masks.py and visualizer.py use bool; the semantic evaluator int and float; pascal_voc.py str. The class
        # histogram of a training set (int) ignores the error and would not be printed.
        if alias.__name__ not in vars(numpy):
            setattr(numpy, alias.__name__, alias)
    if getattr(lr_scheduler, "_LRScheduler", None) is not lr_scheduler.LRScheduler:
        # The hook that saves the schedule in a checkpoint tests for the old base class. Since torch 2.0 torch's own
        # schedulers do not derive from it, and their state would not be saved, without a message.
        lr_scheduler._LRScheduler = lr_scheduler.LRScheduler  # type: ignore[misc, assignment]


def silence_known_warnings() -> None:
    """Hide two deprecation warnings that Detectron2 causes in every run and that users cannot act on."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", category=UserWarning)


def silence_diverged_losses() -> None:
    """Hide the traceback that upstream's main logs for a loss that is not finite: the run reports it in one line."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_diverged_loss)


def _is_no_diverged_loss(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], FloatingPointError))


def provide_operators() -> None:
    """Provide a `detectron2._C` where none can be loaded."""
    try:
        importlib.import_module("detectron2._C")
        return
    except ModuleNotFoundError:
        stand_in = MissingOperators()
    except ImportError as error:
        stand_in = MissingOperators(f"it does not load ({error})")
        logger.warning(
            "Detectron2's C++ operators failed to load; continuing without them. Rebuild Detectron2 if PyTorch was"
            " replaced after it was built (%s)",
            error,
        )
    sys.modules["detectron2._C"] = stand_in
    sys.modules["detectron2"]._C = stand_in  # type: ignore[attr-defined]


def provide_fast_evaluation() -> None:
    """Let the compiled COCO evaluation fall back to pycocotools where it is missing.

    `evaluation/coco_evaluation.py` imports it unconditionally in v0.6 and uses it by default.
    """
    if not isinstance(sys.modules["detectron2._C"], MissingOperators):
        return
    cocoeval = importlib.import_module("pycocotools.cocoeval")
    fallback = types.ModuleType("detectron2.evaluation.fast_eval_api")
    fallback.COCOeval_opt = cocoeval.COCOeval  # type: ignore[attr-defined]
    sys.modules[fallback.__name__] = fallback


def provide_resource_names() -> None:
    """Import `model_zoo`, which locates its configs by `pkg_resources`, where setuptools (81 and newer) lacks it.

    The replacement exists only during this import, because other libraries test for the real module.
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
    """Apply all of the above, in the order in which Detectron2's modules need it.

    Raises:
        UserError: Detectron2 is not installed.
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

import logging
import subprocess
import sys
import types

import numpy
import PIL.Image
import pytest
from torch.optim import lr_scheduler

pytest.importorskip("detectron2")

from foundation import detectron2_compat


def test_the_removed_names_are_back():
    assert PIL.Image.LINEAR == PIL.Image.Resampling.BILINEAR
    assert numpy.zeros(1, dtype=numpy.int).dtype == numpy.int64
    assert numpy.zeros(1, dtype=numpy.float).dtype == numpy.float64
    assert numpy.zeros(1).astype(numpy.bool).dtype == bool
    assert numpy.asarray(["a"], dtype=numpy.str).dtype.kind == "U"


def test_names_that_are_there_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(PIL.Image, "LINEAR", "upstream's own")
    monkeypatch.setattr(numpy, "int", "upstream's own")
    detectron2_compat.restore_removed_names()
    assert PIL.Image.LINEAR == numpy.int == "upstream's own"


def test_any_schedule_of_torch_counts_as_one():
    assert issubclass(lr_scheduler.CosineAnnealingLR, lr_scheduler._LRScheduler)
    from detectron2.solver.lr_scheduler import LRMultiplier

    assert issubclass(LRMultiplier, lr_scheduler._LRScheduler)


def test_a_compiled_module_is_left_alone(monkeypatch):
    compiled = types.ModuleType("detectron2._C")
    monkeypatch.setitem(sys.modules, "detectron2._C", compiled)
    fast = sys.modules.get("detectron2.evaluation.fast_eval_api")
    detectron2_compat.provide_operators()
    detectron2_compat.provide_fast_evaluation()
    assert sys.modules["detectron2._C"] is compiled
    assert sys.modules.get("detectron2.evaluation.fast_eval_api") is fast


def test_the_stand_in_answers_the_environment_table_and_names_what_it_lacks():
    operators = detectron2_compat.MissingOperators()
    assert "without its C++" in operators.get_compiler_version()
    assert operators.get_cuda_version() == operators.get_compiler_version()
    assert not operators.has_cuda()
    with pytest.raises(AttributeError, match=r"box_iou_rotated .*C\+\+ operators"):
        operators.box_iou_rotated()


def test_a_compiled_module_that_does_not_load_is_replaced_with_a_warning(monkeypatch):
    import detectron2

    for place in (sys.modules, vars(detectron2)):  # both put back afterwards
        key = "detectron2._C" if place is sys.modules else "_C"
        monkeypatch.setitem(place, key, place[key])
    said = []
    monkeypatch.setattr(detectron2_compat.logger, "warning", lambda text, *values: said.append(text % values))
    with monkeypatch.context() as broken:

        def fail(name):
            raise ImportError(f"{name}: undefined symbol: _ZN2at")

        broken.setattr(detectron2_compat.importlib, "import_module", fail)
        detectron2_compat.provide_operators()
    assert isinstance(sys.modules["detectron2._C"], detectron2_compat.MissingOperators)
    assert "undefined symbol: _ZN2at" in detectron2._C.get_compiler_version()
    (line,) = said
    assert "Rebuild Detectron2 if PyTorch was replaced" in line


def test_of_main_s_log_only_the_traceback_of_a_diverged_loss_is_left_out():
    logger = logging.getLogger("detectron2.engine.train_loop")
    for error, shown in ((FloatingPointError("nan"), False), (OSError("disk"), True)):
        record = logging.makeLogRecord({"msg": "Exception in writing metrics", "exc_info": (type(error), error, None)})
        assert bool(logger.filter(record)) is shown
    assert logger.filter(logging.makeLogRecord({"msg": "no exception"}))


def test_without_compiled_module_the_evaluation_is_pycocotools():
    import detectron2._C
    from detectron2.evaluation import coco_evaluation
    from pycocotools.cocoeval import COCOeval

    if not isinstance(detectron2._C, detectron2_compat.MissingOperators):
        pytest.skip("this Detectron2 has its compiled module")
    assert coco_evaluation.COCOeval_opt is COCOeval


def test_the_model_zoo_works_without_pkg_resources():
    program = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'pkg_resources' else real(name, *rest)\n"
        "import foundation.detectron2_compat, pathlib\n"
        "assert 'pkg_resources' not in sys.modules\n"
        "from detectron2 import model_zoo\n"
        "name = 'COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml'\n"
        "assert pathlib.Path(model_zoo.get_config_file(name)).is_file()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_a_missing_detectron2_is_said_in_one_line():
    program = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'detectron2' else real(name, *rest)\n"
        "from foundation.errors import run\n"
        "def main(argv): import foundation.detectron2_compat\n"
        "run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: Detectron2 is not installed: run `python -m detection.install`\n"

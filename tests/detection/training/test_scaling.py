"""Batch, rate and schedule for other numbers of processes, fewer images, other weights."""

import pytest

pytest.importorskip("detectron2")

from detection import config as configs
from detection.training import scaling
from foundation.errors import UserError

# isort: split
from detectron2.engine import DefaultTrainer


def load(*pairs, name="coco_R50_C4"):
    return configs.load(name, [str(value) for value in pairs])


@pytest.mark.parametrize("processes", [1, 2, 8, 16])
def test_the_reference_world_size_scales_as_in_detectron2(processes):
    config = load("SOLVER.REFERENCE_WORLD_SIZE", 8, "TEST.EVAL_PERIOD", 5000)
    assert scaling.scale(config, processes) == DefaultTrainer.auto_scale_workers(config, processes)


def test_half_the_processes_by_hand():
    config = scaling.scale(load("SOLVER.REFERENCE_WORLD_SIZE", 8), 4)
    solver = config.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (8, 0.01)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (360000, (240000, 320000), 2000)
    assert (solver.CHECKPOINT_PERIOD, solver.REFERENCE_WORLD_SIZE) == (10000, 4)
    assert scaling.scale(config, 4) == config  # loaded again from config.yaml, the run is the same


def test_a_period_does_not_become_never():
    pairs = ["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2]
    config = scaling.scale(load(*pairs, "SOLVER.MAX_ITER", 4), 16)
    assert (config.SOLVER.CHECKPOINT_PERIOD, config.TEST.EVAL_PERIOD, config.SOLVER.MAX_ITER) == (1, 1, 1)


def test_without_a_reference_the_protocol_stays():
    config = load("SOLVER.ACCUMULATION", 8)
    assert scaling.scale(config, 1) == config
    assert scaling.scale(load(), 8) == load()


@pytest.mark.parametrize(
    ("exponent", "iterations", "steps", "warmup"),
    [(0, 180000, (120000, 160000), 1000), (1, 1800, (1200, 1600), 10), (0.5, 18000, (12000, 16000), 100)],
)
def test_the_schedule_of_one_percent_of_the_images(exponent, iterations, steps, warmup):
    config = scaling.scale(load("DATASETS.FRACTION", 0.01, "SOLVER.FRACTION_EXPONENT", exponent), 1)
    found = (config.SOLVER.MAX_ITER, config.SOLVER.STEPS, config.SOLVER.WARMUP_ITERS)
    assert found == (iterations, steps, warmup)
    assert config.DATASETS.FRACTION == 0.01
    assert scaling.scale(config, 1) == config


@pytest.mark.parametrize(
    ("fraction", "iterations", "steps"),
    [
        (1 / 18000, 10, (7, 9)),  # 6.67 and 8.89
        (5 / 180000, 5, (3, 4)),  # 3.33 and 4.44
        (4 / 180000, 4, (2, 3)),  # 2.67 and 3.56, which rounds to the end
    ],
)
def test_the_steps_of_a_short_schedule_stay_apart(fraction, iterations, steps):
    config = scaling.scale(load("DATASETS.FRACTION", fraction, "SOLVER.FRACTION_EXPONENT", 1), 1)
    assert (iterations, steps) == (config.SOLVER.MAX_ITER, config.SOLVER.STEPS)


@pytest.mark.parametrize("iterations", [3, 2, 1, 0.1])
def test_a_schedule_too_short_for_its_steps(iterations):
    pairs = ["DATASETS.FRACTION", iterations / 180000, "SOLVER.FRACTION_EXPONENT", 1]
    with pytest.raises(UserError, match=r"SOLVER\.STEPS \(120000, 160000\) of 180,000 .* leave the steps out"):
        scaling.scale(load(*pairs), 1)
    assert max(1, round(iterations)) == scaling.scale(load(*pairs, "SOLVER.STEPS", "()"), 1).SOLVER.MAX_ITER


def test_steps_after_the_end_stay_there():
    """They matter only to a run that is continued for longer."""
    pairs = ["DATASETS.FRACTION", 0.1, "SOLVER.FRACTION_EXPONENT", 1, "SOLVER.MAX_ITER", 100, "SOLVER.STEPS"]
    assert scaling.scale(load(*pairs, "(60, 101, 200)"), 1).SOLVER.STEPS == (6, 11, 20)


@pytest.mark.parametrize(
    ("pairs", "processes", "message"),
    [
        (["SOLVER.IMS_PER_BATCH", 12], 8, "12 is not a multiple of the number of processes, 8"),
        (["SOLVER.ACCUMULATION", 3], 2, "16 is not a multiple of the number of processes, 2 times .*ACCUMULATION, 3"),
        (["SOLVER.REFERENCE_WORLD_SIZE", 3], 2, r"not a multiple of SOLVER\.REFERENCE_WORLD_SIZE, 3"),
    ],
)
def test_a_batch_that_cannot_be_divided(pairs, processes, message):
    with pytest.raises(UserError, match=message):
        scaling.scale(load(*pairs), processes)


@pytest.mark.parametrize(
    ("recipe", "preset", "rate", "warmup"),
    [
        ("coco_R50_C4_1x", "moco", 0.02, (1000, 0.001)),
        ("coco_R50_C4_1x", "lars", 0.03, (1000, 0.001)),
        ("voc_R50_C4_24k", "moco", 0.02, (100, 0.001)),
        ("voc_R50_C4_24k", "lars", 0.1, (1000, 0.333)),
        ("voc_semseg_R50_FCN", "lars", 0.0045, (0, 0.001)),  # no source of its own: the same step as elsewhere
    ],
)
def test_presets_are_the_published_rates(recipe, preset, rate, warmup):
    """Barlow Twins, appendix C.2, for weights that were pretrained with LARS."""
    solver = scaling.apply_preset(load(name=recipe), preset).SOLVER
    found = (solver.BASE_LR, solver.WARMUP_ITERS, solver.WARMUP_FACTOR)
    assert found == (pytest.approx(rate), *warmup)


def test_what_results_is_said():
    accumulated = scaling.scale(load("SOLVER.ACCUMULATION", 8), 1)
    assert scaling.describe(accumulated, 1, 117266) == (
        "1 process, 16 images a step (16 a process in 8 passes of 2), learning rate 0.02,"
        " 180,000 iterations = 24.6 epochs of 117,266 images"
    )
    smaller = scaling.scale(load("SOLVER.REFERENCE_WORLD_SIZE", 8), 2)
    assert scaling.describe(smaller, 2, 117266) == (
        "2 processes, 4 images a step (2 a process), learning rate 0.005,"
        " 720,000 iterations = 24.6 epochs of 117,266 images"
    )

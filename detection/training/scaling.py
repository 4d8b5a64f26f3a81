"""Adapt a recipe to less memory, another number of processes, a fraction of the images, or other weights.

- `SOLVER.ACCUMULATION` keeps the batch, and so the protocol: it is the number of passes for each step of the optimizer.
- `SOLVER.REFERENCE_WORLD_SIZE` keeps the batch of each process: batch and learning rate grow with the number of
  processes, and the schedule shrinks, as in Detectron2's `auto_scale_workers`.
- `SOLVER.FRACTION_EXPONENT` adapts the schedule to `DATASETS.FRACTION`.
- A preset adapts the learning rate to the optimizer that the weights were pretrained with.

What has been applied is set to its neutral value, so that the config of a run, loaded again, gives the same run.
"""

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from foundation.errors import UserError
from foundation.names import counted

# The recipes have the learning rate of MoCo's protocol, 0.02 for 16 images on COCO and VOC. Weights that were
# pretrained with LARS (Barlow Twins, VICReg, SwAV, SimCLR, BYOL) need a larger one: Zbontar et al. 2021 (Barlow Twins),
# appendix C.2, has 0.1 on VOC and 0.03 on COCO.
PRESETS = {"moco": {"voc": 1.0, "other": 1.0}, "lars": {"voc": 5.0, "other": 1.5}}
LARS_VOC_WARMUP = (1000, 0.333)  # iterations, factor; the same source. VOC's recipe has 100 and 0.001.


def apply_preset(config: CfgNode, preset: str) -> CfgNode:
    """A copy with the learning rate of a preset, `moco` or `lars`: a factor on the recipe's own, for any batch."""
    config = config.clone()
    boxes_of_voc = all(name.startswith("voc_") and "sem_seg" not in name for name in config.DATASETS.TRAIN)
    family = "voc" if boxes_of_voc else "other"
    config.SOLVER.BASE_LR *= PRESETS[preset][family]
    if (preset, family) == ("lars", "voc"):
        config.SOLVER.WARMUP_ITERS, config.SOLVER.WARMUP_FACTOR = LARS_VOC_WARMUP
    return config


def scale(config: CfgNode, processes: int) -> CfgNode:
    """A copy with schedule, batch and learning rate for `DATASETS.FRACTION` of the images and this number of processes.

    Raises:
        UserError: the batch is not a multiple of the processes and passes, or the schedule becomes too short.
    """
    config = config.clone()
    solver = config.SOLVER
    _stretch_schedule(config, config.DATASETS.FRACTION**solver.FRACTION_EXPONENT)
    solver.FRACTION_EXPONENT = 0.0
    if solver.REFERENCE_WORLD_SIZE:
        if solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE,"
                f" {solver.REFERENCE_WORLD_SIZE}, the number of processes that it is meant for"
            )
        factor = processes / solver.REFERENCE_WORLD_SIZE
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * factor)
        solver.BASE_LR *= factor  # Goyal et al. 2017, the linear rule
        _stretch_schedule(config, 1 / factor)
        solver.REFERENCE_WORLD_SIZE = processes
    if solver.IMS_PER_BATCH % (processes * solver.ACCUMULATION):
        times = f" times SOLVER.ACCUMULATION, {solver.ACCUMULATION}" if solver.ACCUMULATION > 1 else ""
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of the number of processes,"
            f" {processes}{times}"
        )
    return config


def describe(config: CfgNode, processes: int, images: int) -> str:
    """A scaled config in one line; `images` is the size of the training set."""
    solver = config.SOLVER
    own = solver.IMS_PER_BATCH // processes
    passes = f" in {solver.ACCUMULATION} passes of {own // solver.ACCUMULATION}" if solver.ACCUMULATION > 1 else ""
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / images
    return (
        f"{counted(processes, 'process')}, {counted(solver.IMS_PER_BATCH, 'image')} a step ({own} a process"
        f"{passes}), learning rate {solver.BASE_LR:g}, {solver.MAX_ITER:,} iterations = {epochs:.3g} epochs of"
        f" {counted(images, 'image')}"
    )


def advise_on_memory(config: CfgNode, processes: int) -> str:
    """What to change where a pass of the model does not fit the memory of a GPU."""
    passes = config.SOLVER.ACCUMULATION
    if config.SOLVER.IMS_PER_BATCH // (processes * passes) > 1:
        return f"raise SOLVER.ACCUMULATION (now {passes}), which keeps the batch of a step"
    return "a pass has one image; lower INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN"


def _stretch_schedule(config: CfgNode, factor: float) -> None:
    """Multiply every length of the schedule, in place, so that it keeps its shape.

    Raises:
        UserError: it becomes too short for its steps.
    """
    solver, test = config.SOLVER, config.TEST
    iterations = max(1, round(solver.MAX_ITER * factor))
    solver.STEPS = _stretch_steps(solver.STEPS, solver.MAX_ITER, iterations, factor)
    solver.MAX_ITER = iterations
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * factor)
    solver.CHECKPOINT_PERIOD = max(1, round(solver.CHECKPOINT_PERIOD * factor))
    if test.EVAL_PERIOD:  # 0: only at the end
        test.EVAL_PERIOD = max(1, round(test.EVAL_PERIOD * factor))


def _stretch_steps(steps: Sequence[int], planned: int, iterations: int, factor: float) -> tuple[int, ...]:
    """The steps of a schedule of `iterations` instead of `planned`, each less than one iteration from its place.

    Steps that rounding would put onto another one, or onto the end, come earlier. Steps from the end on stay there.

    Raises:
        UserError: too few iterations for the steps.
    """
    stretched = {max(iterations + (step > planned), round(step * factor)) for step in steps if step >= planned}
    following = iterations
    for step in sorted((step for step in steps if step < planned), reverse=True):
        following = min(max(1, round(step * factor)), following - 1)
        if following < 1 or following <= step * factor - 1:
            raise UserError(
                f"SOLVER.STEPS {tuple(steps)} of {planned:,} iterations do not fit into {iterations:,}, to which"
                " DATASETS.FRACTION or the number of processes shortens them: set a larger DATASETS.FRACTION or a"
                " smaller SOLVER.FRACTION_EXPONENT, or leave the steps out with SOLVER.STEPS ()"
            )
        stretched.add(following)
    return tuple(sorted(stretched))

"""`--dry-run`: epochs, learning rates, memory and hours of a run, before anything is trained.

Time and memory are measured on a few passes of the model over training images on this machine, of one process.
"""

import resource
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from fvcore.nn.precise_bn import get_bn_modules

from detection.data import loading, training_data
from detection.training import checkpoints, prepare, scaling, trainer
from foundation import devices, machine
from foundation.names import counted

TIMED = 3  # passes, after one to warm up
FEW = 2  # images in a timed pass on a CPU, and with test-time augmentation: large images take minutes otherwise
QUICK = 1.0  # seconds of such a pass, below which a full pass is timed instead
EVALUATED = 4  # images
FORWARD = 1 / 3  # of the time of a training pass: estimating batch norms runs no backward pass


def describe(config: CfgNode, processes: int) -> Iterator[str]:
    """The lines to print for a config that was scaled to the number of processes.

    Raises:
        UserError: the datasets, the weights or the config would stop a run, or the model does not fit the device.
    """
    solver, device = config.SOLVER, config.MODEL.DEVICE
    prepare.check_ahead(config, begun=checkpoints.exists(Path(config.OUTPUT_DIR)))
    images = training_data.read(config)
    held_out = sum(len(DatasetCatalog.get(name)) for name in config.DATASETS.TEST)
    yield scaling.describe(config, processes, len(images.records))
    model = trainer.TransferTrainer.build_model(config)
    optimizer = trainer.TransferTrainer.build_optimizer(config, model)
    yield _rates(config, optimizer)
    yield _size(config, model)
    evaluations = _count_evaluations(config)
    augmented = " and one with test-time augmentation" * config.TEST.AUG.ENABLED
    yield f"{counted(evaluations, 'evaluation')}{augmented} on {counted(held_out, 'image')}"

    per_pass = solver.IMS_PER_BATCH // (processes * solver.ACCUMULATION)
    timed = min(per_pass, FEW) if device == "cpu" else per_pass
    with devices.report_out_of_memory(scaling.advise_on_memory(config, processes)):
        computing, reading = _time_training(config, images, model, optimizer, timed)
        if timed < per_pass and computing < QUICK:
            timed = per_pass
            computing, reading = _time_training(config, images, model, optimizer, timed)
        evaluating = _time_evaluation(config, model, EVALUATED)
        augmenting = 0.0
        if config.TEST.AUG.ENABLED:
            augmenting = _time_evaluation(config, GeneralizedRCNNWithTTA(config, model), FEW)
    yield _memory(device, timed)
    workers = config.DATALOADER.NUM_WORKERS
    parts = per_pass * solver.ACCUMULATION / timed
    computing, reading = computing * parts, reading * parts / max(1, workers)
    iteration = max(computing, reading) if workers else computing + reading
    precise = config.TEST.PRECISE_BN
    estimating = precise.NUM_ITER * iteration * FORWARD if precise.ENABLED and get_bn_modules(model) else 0.0
    testing = evaluations * (evaluating * held_out / processes + estimating) + augmenting * held_out / processes
    training = solver.MAX_ITER * iteration
    bound = "; reading images takes longer than computing: raise DATALOADER.NUM_WORKERS" * (reading > computing)
    yield (
        f"{iteration:.2f} s an iteration{bound}; training {_duration(training)}, evaluation {_duration(testing)},"
        f" together {_duration(training + testing)}"
    )


def _size(config: CfgNode, model: torch.nn.Module) -> str:
    """The number of parameters, and the size of a checkpoint."""
    solver, weights = config.SOLVER, sum(parameter.numel() for parameter in model.parameters())
    # Of float32: the weights, the optimizer's momentum or moments, and the average.
    copies = 1 + (bool(solver.MOMENTUM) if solver.OPTIMIZER == "SGD" else 2) + bool(solver.EMA)
    size = weights * 4 * copies / 1e6
    return f"{weights / 1e6:.1f} million parameters; checkpoints of {size:.0f} MB, with the optimizer's state"


def _count_evaluations(config: CfgNode) -> int:
    """Evaluations of a run's weights during its training, at its end, and of their average."""
    period = config.TEST.EVAL_PERIOD
    return ((config.SOLVER.MAX_ITER - 1) // period if period else 0) + 1 + bool(config.SOLVER.EMA)


def _rates(config: CfgNode, optimizer: torch.optim.Optimizer) -> str:
    """The learning rate where the schedule turns, by the scheduler itself."""
    solver = config.SOLVER
    turns = {0, min(solver.WARMUP_ITERS, solver.MAX_ITER - 1), solver.MAX_ITER - 1}
    turns |= {step for step in solver.STEPS if step < solver.MAX_ITER}
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        turns |= {solver.MAX_ITER // 2}
    scheduler = trainer.TransferTrainer.build_lr_scheduler(config, optimizer)
    rates = {}
    for turn in sorted(turns):
        scheduler.last_epoch = turn  # of a schedule that is a function of the iteration
        rates[turn] = scheduler.get_lr()[0]
    return "learning rate " + ", ".join(f"{rate:.3g} at {turn:,}" for turn, rate in rates.items())


def _time_training(
    config: CfgNode,
    images: training_data.TrainingSet,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    size: int,
) -> tuple[float, float]:
    """Seconds of a pass of `size` images forward and backward, and of reading them in one process."""
    config = config.clone()
    config.SOLVER.IMS_PER_BATCH = size
    batches = iter(training_data.build_batches(config, images, loading.ProcessBatch(), config.SEED, workers=0))
    model.train()
    reading, computing = [], []
    with EventStorage():
        for _ in range(1 + TIMED):
            start = time.perf_counter()
            batch = next(batches)
            middle = time.perf_counter()
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            _synchronize(config)
            reading.append(middle - start)
            computing.append(time.perf_counter() - middle)
    return sorted(computing[1:])[TIMED // 2], sorted(reading[1:])[TIMED // 2]


def _time_evaluation(config: CfgNode, model: torch.nn.Module, images: int) -> float:
    """Seconds of an image of the test set, from a few, by the model as it is now; one that finds more takes longer."""
    model.eval()
    loader = trainer.TransferTrainer.build_test_loader(config, config.DATASETS.TEST[0])
    seconds = []
    with torch.no_grad():
        for _, inputs in zip(range(images), loader, strict=False):
            start = time.perf_counter()
            model(inputs)
            _synchronize(config)
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _memory(device: str, images: int) -> str:
    """The memory that the measured passes took at most, and what there is."""
    if device == "cuda":
        _, total = torch.cuda.mem_get_info()
        used = torch.cuda.max_memory_reserved()
        return f"GPU memory for {counted(images, 'image')} in a pass: {used / 1e9:.1f} of {total / 1e9:.1f} GB"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free = machine.available_memory()
    left = f"; {free / 1e9:.1f} GB are available beside it" if free else ""
    return f"memory of this process with {counted(images, 'image')} in a pass: {used / 1e9:.1f} GB{left}"


def _synchronize(config: CfgNode) -> None:
    if config.MODEL.DEVICE == "cuda":
        torch.cuda.synchronize()


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else str(timedelta(seconds=round(seconds)))

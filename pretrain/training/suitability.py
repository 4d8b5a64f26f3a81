"""What is checked before a run begins: its inputs, and whether its recipe can work on the images at hand."""

from collections.abc import Collection

import torch
from fvcore.common.config import CfgNode

from foundation.errors import UserError
from foundation.names import counted
from foundation.wandb_mirror import require_wandb
from pretrain.config import get_defaults
from pretrain.distributed import group
from pretrain.images.labelled import split_labelled_folder
from pretrain.runs.weights import RANDOM, EncoderWeights, read_weights
from pretrain.training.dry_run import Memory, count_memory, device_memory, format_size, needed_steps
from pretrain.training.schedule import StepRange

OWN = ("folder", "webdataset")  # sets whose size no recipe knows
ROOM = 0.9  # of the free memory, which an advice fills at most


def check_inputs(config: CfgNode) -> None:
    """Read what a new run needs besides its images: the weights to begin from, the labelled images, wandb.

    Raises:
        UserError: they are not there, or do not fit.
    """
    if config.ENCODER.WEIGHTS:
        check_architecture(read_weights(config.ENCODER.WEIGHTS), config)
    if config.PROBE.ROOT:
        split_labelled_folder(config.PROBE.ROOT)
    if config.LOG.WANDB:
        require_wandb()


def check_architecture(
    weights: EncoderWeights, config: CfgNode, keys: Collection[str] = ("ENCODER.NAME", "ENCODER.STEM")
) -> None:
    """Raises UserError where weights are random, or of another encoder than these keys of the configuration say."""
    if weights.init == RANDOM:
        raise UserError("--weights random (ENCODER.WEIGHTS) is the default here: leave it out, or name a file")
    encoder = config.ENCODER
    for key, asked, own in (("ENCODER.NAME", encoder.NAME, weights.name), ("ENCODER.STEM", encoder.STEM, weights.stem)):
        if key in keys and own and own != asked:
            raise UserError(f"{weights.source} holds a {own}, but {key} is {asked}; set {key} {own}")


def probe_warning(config: CfgNode) -> list[str]:
    """A warning where keys of the online probe are set, and it does not run."""
    defaults = get_defaults().PROBE
    changed = [f"PROBE.{key}" for key in sorted(defaults) if config.PROBE[key] != defaults[key]]
    if config.PROBE.EVERY or not changed:
        return []
    return [
        f"warning: with PROBE.EVERY 0 nothing is probed during training ({', '.join(changed)}): set PROBE.EVERY to a"
        " number of epochs"
    ]


def steps_warning(config: CfgNode, planned: bool, images: int) -> list[str]:
    """A warning where a run takes too few steps on so many images to learn much.

    Args:
        config: of the run.
        planned: whether its values are the plan's, not a recipe's.
        images: in the dataset.
    """
    per_epoch = images // config.TRAIN.BATCH_SIZE
    steps = StepRange.of(config, images, first=0).last
    few, enough = needed_steps(config)
    if config.DATA.NAME not in OWN or config.TRAIN.MAX_STEPS or steps >= few or not per_epoch:
        return []
    epochs = -(-enough // per_epoch)
    advice = f"give --epochs {epochs}, or more --hours"
    if not planned:
        advice = (
            f"set TRAIN.EPOCHS {epochs}, lower TRAIN.BATCH_SIZE with P, or leave --config out and name the folder: "
            "`pretrain/train.py FOLDER --dry-run` plans for it"
        )
    return [
        f"warning: {counted(steps, 'step')} {'is' if steps == 1 else 'are'} too few to learn much "
        f"({counted(images, 'image')}, TRAIN.BATCH_SIZE {config.TRAIN.BATCH_SIZE}: {per_epoch} an epoch); {advice}"
    ]


def memory_warning(config: CfgNode, device: torch.device, processes: int) -> list[str]:
    """A warning where a run needs more memory than is free, by counting.

    Raises:
        UserError: the weights with the objective's estimates, or the activations, alone are more than is free.
    """
    there = device_memory(device, processes)
    if there is None:
        return []
    memory = count_memory(config, processes, device)
    share = config.TRAIN.BATCH_SIZE // processes
    part = min(share, config.TRAIN.MICRO_BATCH or share)
    where = "the GPU" if device.type == "cuda" else "this machine"
    free = f"{where} has {format_size(there)} free"
    if device.type == "cpu" and group.announced_here(processes) > 1:
        free += " for each of its processes"
    if memory.parameters > there:
        raise UserError(
            f"weights, gradients, momentum and the running covariance need {format_size(memory.parameters)}, and "
            f"{free}; lower PROJECTOR.DIMS, or choose a smaller ENCODER.NAME"
        )
    loader = 0 if device.type == "cuda" else memory.loader
    if memory.training + loader <= there:
        return []
    advice = _advise(memory, loader, part, config.DATA.WORKERS, there)
    if memory.activations > there:
        needed = f"{part} pairs at once need {format_size(memory.activations)} for activations"
        raise UserError(f"{needed}, and {free}; {advice}")
    return [f"warning: about {format_size(memory.training + loader)} of memory are needed, and {free}; {advice}"]


def _advise(memory: Memory, loader: int, part: int, workers: int, there: int) -> str:
    """What to lower: the workers where the training step fits without them, else the pairs at once, else both.

    Args:
        memory: that a process needs.
        loader: bytes of its workers that count.
        part: pairs at once.
        workers: of the loader.
        there: bytes that are free.
    """
    room = ROOM * there
    beside = room - memory.training if memory.training <= there else min(loader, room / 2)
    fewer = max(0, int(workers * beside / max(1, loader)))
    of_loader = f"set DATA.WORKERS {fewer} (the batches of {counted(workers, 'worker')} take {format_size(loader)})"
    if memory.training <= there:
        return of_loader
    pairs = part * (room - beside - memory.parameters) / (memory.training - memory.parameters)
    smaller = 2 ** (max(2, int(pairs)).bit_length() - 1)
    of_training = "lower DATA.IMAGE_SIZE"
    if smaller < part:
        of_training = f"set TRAIN.MICRO_BATCH {smaller} (the loss stays that of the whole batch), or {of_training}"
    return of_training if beside == loader else f"{of_training}; and {of_loader}"

"""The plan for a user's own images: every value of the configuration that depends on the images or on the machine.

`plan_run` looks at the images and the machine, `choose` applies the rules. Each value comes with its reason. Keys that
the user gives stay as given, and the rules for the other keys follow them. Where a rule comes from a measurement of
this project or from a publication, docs/own_images.md says which.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from foundation import machine
from foundation.devices import is_out_of_memory
from foundation.errors import UserError
from foundation.names import counted
from pretrain.batches.sampler import check_batch
from pretrain.config import build_streaming
from pretrain.distributed.group import announced_here
from pretrain.images.labelled import build_labelled_splits
from pretrain.images.sources import Source, build_source, hidden_in
from pretrain.images.survey import Survey, check_readable, survey
from pretrain.runs.weights import EncoderWeights, read_weights
from pretrain.training import dry_run
from pretrain.training.dry_run import ENOUGH_STEPS, Memory, format_size
from pretrain.training.suitability import check_architecture

CPU_HOURS = 4.0  # what a plan may take on a CPU, unless the user says otherwise
CPU_SIDES = (48, 40)  # pixels; the largest whose steps fit the hours is taken
SMALLEST_PART = 32  # pairs that BatchNorm should see at least
PER_DIMENSION = 8  # images of a batch for each dimension of the embedding
ALPHA_PER_DIMENSION = 3.90625  # 125 / 32, 250 / 64, 500 / 128, 2000 / 512: the recipes' attraction over P
MIN_IMAGES = 16
LARGE = 700  # pixels of the shorter side from which decoding costs much more than the views
HEADROOM = 0.9  # of the memory that may be used


@dataclass(frozen=True)
class Place:
    """Where the run is to happen.

    Args:
        kind: `cpu` or `cuda`.
        cores: of the host, for each training process.
        memory: bytes for training, on the GPU or the host; None where the system does not say.
        processes: that train together.
    """

    kind: str
    cores: int
    memory: int | None
    processes: int = 1


@dataclass(frozen=True)
class Measures:
    """Measurements that the rules use. Each takes the configuration as planned so far."""

    seconds_per_pair: Callable[[CfgNode], float]  # of the training step, without loading
    loading: Callable[[CfgNode], float]  # seconds of one core for the two views of an image
    memory: Callable[[CfgNode], Memory]


def plan_run(
    config: CfgNode, given: Collection[str], device: torch.device, processes: int, hours: float | None
) -> tuple[CfgNode, list[str]]:
    """The complete configuration for the images of DATA.ROOT, and the lines that explain it.

    Args:
        config: defaults, with DATA.NAME, DATA.ROOT and the user's own keys.
        given: dotted keys that the user has set.
        device: of this process.
        processes: that share the batch.
        hours: that the run may take; None: as the rules say.

    Raises:
        UserError: too few images, more damaged ones than allowed, or weights that cannot be read.
    """
    data = config.DATA
    origin = "DATA.ROOT" if "DATA.ROOT" in given else "PATH"
    source = build_source(data.NAME, data.ROOT, "pretrain", data.CLASSES, build_streaming(config), origin=origin)
    weights = read_weights(config.ENCODER.WEIGHTS) if config.ENCODER.WEIGHTS else None
    if weights:
        check_architecture(weights, config, given)  # before anything is measured
    facts = survey(source)
    damage = check_readable(source, data.MAX_UNREADABLE)
    cores = max(1, machine.usable_cores() // announced_here(processes))
    place = Place(device.type, cores, dry_run.device_memory(device, processes), processes)
    measures = Measures(
        seconds_per_pair=partial(time_pair, device=device),
        loading=partial(dry_run.loading_seconds, source=source),
        memory=lambda c: dry_run.count_memory(c, processes, device),
    )
    planned, reasons = choose(
        config, given, facts, place, measures, weights=weights, hours=hours, labelled=_is_labelled(config)
    )
    return planned, [*describe_facts(config, source, facts, place), *damage, *reasons]


def time_pair(config: CfgNode, device: torch.device) -> float:
    """Seconds of the training step for each pair, timed on as many pairs at once as the device holds.

    Raises:
        UserError: it does not hold two.
    """
    size = max(2, min(dry_run.TIMED_PAIRS[device.type], config.TRAIN.MICRO_BATCH or config.TRAIN.BATCH_SIZE))
    while size >= 2:
        try:
            return 1 / dry_run.pairs_per_second(config, size, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size //= 2
    raise UserError(
        f"two pairs of {config.DATA.IMAGE_SIZE} pixels with PROJECTOR.DIMS {config.PROJECTOR.DIMS} do not fit into "
        "memory; lower DATA.IMAGE_SIZE or PROJECTOR.DIMS"
    )


def _is_labelled(config: CfgNode) -> bool:
    """Whether the folder has labelled train/ and val/ images."""
    if config.DATA.NAME != "folder" or not (Path(config.DATA.ROOT) / "val").is_dir():
        return False
    try:
        build_labelled_splits("folder", config.DATA.ROOT)
    except UserError:
        return False
    return True


def describe_facts(config: CfgNode, source: Source, facts: Survey, place: Place) -> list[str]:
    """What the plan is for: the images and the machine."""
    memory = "" if place.memory is None else f", {format_size(place.memory)} of memory free"
    device = counted(place.cores, "CPU core") if place.kind == "cpu" else "a GPU"
    lines = [
        f"plan for {facts.count:,} images (median {facts.long_side} x {facts.short_side} pixels) on {device}{memory}",
    ]
    if config.DATA.NAME == "folder" and (Path(config.DATA.ROOT) / "train").is_dir():
        left = [entry.name for entry in sorted(Path(config.DATA.ROOT).iterdir()) if entry.is_dir()]
        left.remove("train")
        if left:
            lines.append(f"  images of train/ only; {', '.join(left)} left out, as test images must be")
    images, folders = hidden_in(source)
    if images or folders:
        hidden = " and ".join(
            counted(count, f"hidden {noun}") for count, noun in ((images, "image"), (folders, "folder")) if count
        )
        lines.append(f"  left out: {hidden} (names that begin with a dot)")
    if facts.short_side >= LARGE and config.DATA.NAME == "folder":
        lines.append("  large images: pretrain/pack.py resizes them once; loading takes a fraction of the time then")
    if len(source) < 1000:
        lines.append("  fewer than 1,000 images: no gain from pretraining on them has been shown")
    return lines


def choose(
    config: CfgNode,
    given: Collection[str],
    facts: Survey,
    place: Place,
    measures: Measures,
    *,
    weights: EncoderWeights | None = None,
    hours: float | None = None,
    labelled: bool = False,
) -> tuple[CfgNode, list[str]]:
    """Apply the rules.

    Args:
        config, given, hours: as in `plan_run`.
        facts: about the images.
        place: where the run is to happen.
        measures: of speed and memory.
        weights: that the encoder begins from; None: random.
        labelled: whether the dataset has labelled images to monitor with.

    Returns:
        the configuration, and a line for each decision.

    Raises:
        UserError: there are fewer than `MIN_IMAGES` images.
    """
    if facts.count < MIN_IMAGES:
        raise UserError(f"too few images, {facts.count}: give at least {MIN_IMAGES}, better 1,000 or more")
    plan = _Plan(config.clone(), given)
    start = weights is not None
    bound = hours if hours is not None else CPU_HOURS if place.kind == "cpu" else None
    _choose_encoder(plan, facts, place, weights)
    _choose_batch(plan, facts, place)
    _choose_views(plan, facts)
    _choose_side(plan, facts, place, measures, start, bound)
    _choose_micro_batch(plan, place, measures)
    _choose_steps(plan, facts, place, measures, start, bound, asked=hours is not None)
    _choose_rate(plan, start)
    _choose_workers(plan, place, measures)
    _choose_monitoring(plan, facts.count, labelled)
    return plan.config, plan.lines


class _Plan:
    """A configuration that is being filled, with a line for each decision."""

    def __init__(self, config: CfgNode, given: Collection[str]) -> None:
        self.config, self.given = config, given
        self.lines: list[str] = []
        self._compute: dict[tuple[str, int], float] = {}  # encoder and side -> seconds for each pair

    def compute(self, measures: Measures) -> float:
        """Seconds of the training step for each pair, measured once for each size of the views."""
        key = (self.config.ENCODER.NAME, self.config.DATA.IMAGE_SIZE)
        if key not in self._compute:
            self._compute[key] = measures.seconds_per_pair(self.config)
        return self._compute[key]

    def seconds(self, measures: Measures, place: Place) -> float:
        """Seconds of a run for each pair, loaded by the workers that are given, or else by as many as there may be."""
        share = self.config.TRAIN.BATCH_SIZE // place.processes
        passes = 4 / 3 if 0 < self.config.TRAIN.MICRO_BATCH < share else 1
        workers = self.config.DATA.WORKERS if "DATA.WORKERS" in self.given else most_workers(place)
        return dry_run.seconds_per_pair(
            compute=passes * self.compute(measures),
            load=measures.loading(self.config),
            workers=workers,
            cores=place.cores,
            on_cpu=place.kind == "cpu",
        )[0]

    def set(self, key: str, value: Any, reason: str) -> None:
        """Set a key and record the reason, unless the user has set it."""
        group, name = key.split(".")
        if key in self.given:
            value, reason = self.config[group][name], "as given"
        self.config[group][name] = value
        if reason:
            self.lines.append(f"  {key:<26} {value!s:<22} {reason}")


def _choose_encoder(plan: _Plan, facts: Survey, place: Place, weights: EncoderWeights | None) -> None:
    cuda = place.kind == "cuda"
    if weights and weights.name:
        plan.set("ENCODER.NAME", weights.name, "that of the weights it begins from")
    else:
        reason = "a GPU trains it in hours" if cuda else "ResNet-50 has 2.3 times the operations"
        plan.set("ENCODER.NAME", "resnet50" if cuda else "resnet18", reason)
    if weights:
        plan.set("ENCODER.STEM", weights.stem or "imagenet", "that of the weights")
        plan.set("ENCODER.WEIGHTS", plan.config.ENCODER.WEIGHTS, "")
    else:
        tiny = cuda and facts.short_side <= 40
        reason = "for images of about 32 pixels" if tiny else "strided, as ResNets have it: 16 times less to compute"
        plan.set("ENCODER.STEM", "cifar" if tiny else "imagenet", reason)
        deep = plan.config.ENCODER.NAME in ("resnet50", "resnet101")
        reason = "short trainings of a ResNet-50 need it" if deep else "detectors gained in docs/own_images.md with it"
        plan.set("ENCODER.ZERO_INIT_RESIDUAL", True, reason)
    if weights and weights.mean:
        plan.set("DATA.MEAN", list(weights.mean), "pixel statistics of the weights")
        plan.set("DATA.STD", list(weights.std), "")
    else:
        plan.set("DATA.MEAN", facts.mean, f"measured on {facts.sampled} of the images")
        plan.set("DATA.STD", facts.std, "measured likewise")


def _choose_batch(plan: _Plan, facts: Survey, place: Place) -> None:
    most = 128 if place.kind == "cpu" else 256 if facts.count < 2000 else 512 if facts.count < 30000 else 1024
    quarter = 2 ** int(math.log2(facts.count / 4))
    batch = min(most, max(MIN_IMAGES, quarter))
    batch = max(place.processes * 2, batch // place.processes * place.processes)
    why = f"the power of two within a quarter of the {facts.count:,} images"
    if quarter >= most:
        why = "smaller batches give more steps in the time"
    elif quarter < MIN_IMAGES:
        why = f"the smallest of a plan, although more than a quarter of the {facts.count:,} images"
    plan.set("TRAIN.BATCH_SIZE", batch, why)
    batch = plan.config.TRAIN.BATCH_SIZE
    check_batch(facts.count, batch, place.processes)
    dim = max(2, batch // PER_DIMENSION)
    hidden = min(8192, max(512, 32 * dim))
    plan.set("PROJECTOR.DIMS", [hidden, hidden, dim], f"P = batch / {PER_DIMENSION}: a covariance needs many images")
    dim = plan.config.PROJECTOR.DIMS[-1]
    plan.set("OBJECTIVE.ATTRACTION", round(ALPHA_PER_DIMENSION * dim, 3), "alpha / P = 3.9, as in the article")
    plan.set("OBJECTIVE.FORGETTING", 0.01, "the article's value for all sets but ImageNet")


def _choose_views(plan: _Plan, facts: Survey) -> None:
    plan.set("DATA.DECODE", "scaled", "JPEGs are decoded smaller where their crops stay as large as the views")
    plan.set("AUGMENT.REGION", [0.15, 0.6], "in scenes, views of one region show the same object")
    plan.set("AUGMENT.CROP_SCALE", [0.25, 1.0], "smaller crops too often show nothing of the object")
    if facts.is_grey:
        plan.set("AUGMENT.BRIGHTNESS", 0.6, "the images are grey: brightness and contrast instead of colour")
        plan.set("AUGMENT.CONTRAST", 0.6, "")
        for key in ("SATURATION", "HUE", "GRAY"):
            plan.set(f"AUGMENT.{key}", 0.0, "")
    else:
        plan.set("AUGMENT.GRAY", 0.6, "with weaker values short trainings learn colours only")
        for key, value in {"BRIGHTNESS": 0.6, "CONTRAST": 0.6, "SATURATION": 0.6, "HUE": 0.3}.items():
            plan.set(f"AUGMENT.{key}", value, "as for AUGMENT.GRAY")


def _choose_side(
    plan: _Plan, facts: Survey, place: Place, measures: Measures, start: bool, hours: float | None
) -> None:
    """The side of the views, and with it the speed."""
    own = max(32, facts.short_side // 8 * 8)
    if place.kind == "cuda":
        full = 224 if start or facts.count >= 30000 else 128
        reason = "no more than the images have" if own < full else "224 is usual; 128 costs a third, for small sets"
        plan.set("DATA.IMAGE_SIZE", min(own, full), reason)
    else:
        assert hours is not None  # of a CPU there is always a bound
        wanted = target_steps(facts.count, place.kind, start)
        pairs = wanted * (plan.config.TRAIN.BATCH_SIZE // place.processes)
        reason = f"the largest up to {CPU_SIDES[0]} that takes {wanted:,} steps in {counted(hours, 'hour')}"
        sides = [side for side in CPU_SIDES if side <= own] or [own]
        if "DATA.IMAGE_SIZE" in plan.given:
            sides = [plan.config.DATA.IMAGE_SIZE]
        for side in sides:
            plan.config.DATA.IMAGE_SIZE = side
            if pairs * plan.seconds(measures, place) <= hours * 3600:
                break
        else:
            reason = f"the smallest; even so {wanted:,} steps take more than {counted(hours, 'hour')}"
        plan.set("DATA.IMAGE_SIZE", side, reason)
    small = plan.config.DATA.IMAGE_SIZE <= 64
    plan.set("AUGMENT.BLUR", [0.5, 0.1] if small else [1.0, 0.1], "less on small views" if small else "the article's")
    plan.set("AUGMENT.BLUR_SIGMA", [0.1, 1.0] if small else [0.1, 2.0], "")


def _choose_micro_batch(plan: _Plan, place: Place, measures: Measures) -> None:
    """Halve the images at a time until the activations fit."""
    share = plan.config.TRAIN.BATCH_SIZE // place.processes
    part = share
    if "TRAIN.MICRO_BATCH" not in plan.given and place.memory is not None:
        plan.config.TRAIN.MICRO_BATCH = 0
        while part > SMALLEST_PART and measures.memory(plan.config).training > HEADROOM * place.memory:
            part = max(SMALLEST_PART, part // 2)
            plan.config.TRAIN.MICRO_BATCH = part
    whole = part == share
    reason = "the whole batch fits the memory" if whole else "what the memory holds; the loss stays that of the batch"
    plan.set("TRAIN.MICRO_BATCH", 0 if whole else part, reason)


def target_steps(images: int, kind: str, start: bool) -> int:
    """Steps to aim at.

    From random weights on a GPU: 10,000 for 1,000 images, 22,000 for 10,000, 50,000 for 100,000; on a CPU the least
    that is sensible. From existing weights: 500 for 1,000 images, 2,500 for 10,000, 12,600 for 100,000.
    """
    if start:
        steps = 500 * (images / 1000) ** 0.7
        return round(min(max(steps, 500), 50000), -2)
    if kind == "cpu":
        return ENOUGH_STEPS
    return round(min(max(10000 * (images / 1000) ** 0.35, ENOUGH_STEPS), 100000), -3)


def _choose_steps(
    plan: _Plan,
    facts: Survey,
    place: Place,
    measures: Measures,
    start: bool,
    hours: float | None,
    asked: bool,
) -> None:
    """Epochs from the number of steps that training needs and the time that it may take; warm-up.

    `asked`: whether the user has given the hours. Then a CPU is given as many steps as a GPU.
    """
    batch = plan.config.TRAIN.BATCH_SIZE
    per_epoch = max(1, facts.count // batch)
    steps = target_steps(facts.count, "cuda" if asked else place.kind, start)
    why = "existing weights need few" if start else "5,000 to 30,000 are usual for small sets"
    epochs = math.ceil(steps / per_epoch)
    if hours is not None:
        affordable = int(hours * 3600 / (batch // place.processes * plan.seconds(measures, place)))
        if affordable < steps:
            epochs, why = max(1, affordable // per_epoch), f"as many as fit into {counted(hours, 'hour')} here"
    plan.set("TRAIN.EPOCHS", epochs, f"{counted(epochs * per_epoch, 'step')}: {why}")
    epochs = plan.config.TRAIN.EPOCHS
    plan.set("TRAIN.WARMUP_EPOCHS", min(math.ceil(0.05 * epochs), epochs - 1), "5 % of the epochs, rounded up")


def _choose_rate(plan: _Plan, start: bool) -> None:
    batch = plan.config.TRAIN.BATCH_SIZE
    if plan.config.TRAIN.LR_PER_256:  # it is given, and takes the place of TRAIN.LR
        plan.set("TRAIN.LR_PER_256", plan.config.TRAIN.LR_PER_256, "")
        return
    if start:
        rate, why = 0.03 * (batch / 256) ** 0.5, "0.03 from existing weights, times the root of batch / 256"
    elif batch < 256:
        rate, why = 0.1 * (batch / 256) ** 0.5, "0.1 for a batch of 256, times the root of batch / 256"
    else:
        rate, why = min(0.1 * batch / 256, 0.4), "0.1 for a batch of 256, times batch / 256, at most 0.4"
    plan.set("TRAIN.LR", round(rate, 4), why)


def most_workers(place: Place) -> int:
    """Loader workers of a training process at most: on a CPU they take the cores that the training step needs."""
    return min(place.cores - 1, 1) if place.kind == "cpu" else max(1, place.cores - 1)


def _choose_workers(plan: _Plan, place: Place, measures: Measures) -> None:
    if place.kind == "cpu":
        plan.set("DATA.WORKERS", most_workers(place), "the training step needs the cores more than the loader")
        return
    load, compute = measures.loading(plan.config), plan.compute(measures)
    needed = max(1, math.ceil(1.25 * load / compute))
    cores = f"{counted(place.cores, 'core')} a process"
    reason = f"{1 / load:.0f} images/s a worker, and the GPU takes {1 / compute:.0f}; {cores}"
    plan.set("DATA.WORKERS", min(needed, most_workers(place)), reason)


def _choose_monitoring(plan: _Plan, images: int, labelled: bool) -> None:
    if labelled or plan.config.PROBE.ROOT:
        every = max(1, round(plan.config.TRAIN.EPOCHS / 20))
        plan.set("PROBE.EVERY", every, "kNN accuracy on the labelled images, about 20 times")
        if not plan.config.PROBE.ROOT and images < plan.config.PROBE.K:
            plan.set("PROBE.K", images, "neighbours, of so few images")
    else:
        reason = "no labels: loss terms, effective rank and LDMI are logged; PROBE.ROOT FOLDER adds kNN accuracy"
        plan.set("PROBE.EVERY", 0, reason)

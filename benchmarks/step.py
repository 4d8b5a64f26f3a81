"""The whole training step, against a conventional one and against the encoder alone.

    python benchmarks/step.py                   a CPU: small batches
    python benchmarks/step.py --device cuda     the recipes' sizes
    python benchmarks/step.py --count           the operations that a GPU is given, counted without one

Three things are timed on the same images, in turns:

- ours: the step as `pretrain/train.py` builds it, from a batch of uint8 crops in memory to the updated weights:
  augmentation, network, objective, optimizer, at the precision that suits the device;
- conventional: float32, NCHW, PyTorch's default SGD and convolutions, given float views that are already augmented
  (pinned, for a GPU);
- encoder alone: its forward and backward pass on synthetic views, channels-last, at our precision, with our kernels,
  as a CUDA graph where ours is one. No step with this encoder can be faster; the difference to 1 is the cost of
  augmentation, projector, objective and optimizer.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from fvcore.common.config import CfgNode
from operations import count_step
from timing import Side, alternate, build_parser, print_table, ratio, start
from torch import Tensor, nn

from foundation.config import load_config
from foundation.devices import report_out_of_memory
from foundation.errors import run
from pretrain.batches.copying import copy_ahead
from pretrain.config import get_defaults, resolve_precision
from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.training.build import build_network, build_parts
from pretrain.training.cuda_graph import capture, capture_step, uses_graph
from pretrain.training.dry_run import synthetic_batch
from pretrain.training.step import Trainer
from pretrain.training.two_views import TwoViewNetwork


class Case(NamedTuple):
    """A recipe of configs/pretrain, a batch size for each device, and keys to change."""

    recipe: str
    cpu_batch: int
    cuda_batch: int
    changes: tuple[object, ...] = ()

    def batch(self, device: torch.device) -> int:
        """The batch size for the device."""
        return self.cuda_batch if device.type == "cuda" else self.cpu_batch


COUNTED_BATCH = 192  # of the ImageNet-1K recipe on 8 GPUs
CASES = {"shapes_R18": Case("shapes_R18", 32, 1024), "imagenet1k_R50": Case("imagenet1k_R50", 4, 384)}
QUICK = Case("shapes_R18", 2, 2, ("DATA.IMAGE_SIZE", 32, "PROJECTOR.DIMS", [16, 8]))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure or count, and print."""
    parser = build_parser("Pairs a second of the training step.", threads=0, rounds=5)
    parser.add_argument("--recipe", choices=CASES, default=None, help="one of the recipes; all by default")
    parser.add_argument("--batch", type=int, default=0, help="another batch size")
    parser.add_argument("--count", action="store_true", help="count the operations of a step instead of timing it")
    args = parser.parse_args(argv)
    device = start(args)
    cases = [QUICK] if args.quick else [CASES[args.recipe]] if args.recipe else list(CASES.values())
    if args.count:
        count_operations(cases, args.batch or COUNTED_BATCH)
    else:
        measure(cases, args, device)


def count_operations(cases: Sequence[Case], size: int) -> None:
    """Count and print."""
    for case in cases:
        print(f"\n{case.recipe}, {size} pairs a GPU")
        print_table(["part", "operations", "computing", "GB moved"], count_step(load(case), size, build_trainer))


def load(case: Case) -> CfgNode:
    """The recipe with its changes."""
    return load_config(get_defaults(), case.recipe, "pretrain", [str(change) for change in case.changes])


def measure(cases: Sequence[Case], args: argparse.Namespace, device: torch.device) -> None:
    """Measure and print."""
    sides = ["ours, pairs/s", "conventional", "encoder alone"]
    header = ["encoder", "batch", "precision", *sides, "to conventional", "to encoder alone"]
    print_table(header, (measure_case(case, args, device) for case in cases))


@report_out_of_memory("choose another --batch")
def measure_case(case: Case, args: argparse.Namespace, device: torch.device) -> list[str]:
    """A row of the table."""
    config = load(case)
    size = args.batch or case.batch(device)
    seconds = alternate(build_sides(config, size, device), 1 if args.quick else args.rounds, device)
    speeds = [f"{size / time:.3g}" for time in np.median(seconds, axis=0)]
    precision = resolve_precision(config.TRAIN.PRECISION, device)
    ratios = [ratio(seconds, side=0, reference=reference) for reference in (1, 2)]
    return [f"{config.ENCODER.NAME} at {config.DATA.IMAGE_SIZE}", f"{size}", precision, *speeds, *ratios]


def build_sides(config: CfgNode, size: int, device: torch.device) -> list[Side]:
    """Ours, the conventional step, the encoder alone."""
    batch = synthetic_batch(config, size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    parts = build_parts(config, device)
    trainer = build_trainer(config, parts, device, resolve_precision(config.TRAIN.PRECISION, device))
    graph = uses_graph(config, device, size)
    if graph:
        capture_step(trainer, size, config.DATA.IMAGE_SIZE)
    criterion = build_parts(config, device)["criterion"]
    with mock.patch("pretrain.encoder.use_matrix_products"):  # PyTorch's convolutions on small maps too
        network = build_network(config).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    floats = [torch.randn(batch.images[0].shape, pin_memory=device.type == "cuda") for _ in range(2)]
    views = [view.to(device, memory_format=torch.channels_last) for view in floats]
    alone = build_parts(config, device)["network"]
    if graph:
        capture(alone.encoder, views[:1], trainer.precision)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=trainer.precision == "bfloat16")
    batches = copy_ahead((batch for _ in count()), device)  # as in training
    return [
        lambda: trainer.step(0, next(batches)),
        partial(conventional_step, network, criterion, optimizer, floats, device),
        partial(encoder_pass, alone, views, autocast),
    ]


def build_trainer(config: CfgNode, parts: dict[str, Any], device: torch.device, precision: str) -> Trainer:
    """Our step with network, criterion and optimizer as `pretrain/train.py` builds them."""
    return Trainer(
        **parts,
        learning_rate=lambda step: 1e-3,
        mean=torch.tensor(config.DATA.MEAN, device=device),
        std=torch.tensor(config.DATA.STD, device=device),
        device=device,
        precision=precision,
    )


def conventional_step(
    network: nn.Module,
    criterion: CorInfoMaxLoss,
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    device: torch.device,
) -> None:
    """A step as most repositories write it."""
    z1, z2 = network(*(view.to(device, non_blocking=True) for view in views))
    loss = criterion(z1, z2).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def encoder_pass(network: TwoViewNetwork, views: Sequence[Tensor], autocast: Callable[[], torch.autocast]) -> None:
    """Forward and backward of both views through the encoder, in as many passes as in training."""
    network.encoder.zero_grad()
    for images in [torch.cat(list(views))] if network.together else views:
        with autocast():
            features = network.encoder(images)
        features.float().sum().backward()


if __name__ == "__main__":
    run(main)

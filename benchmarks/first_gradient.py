"""The first gradient of CorInfoMax on the embedded dataset, with torchvision's initialisation of the residual branches
and with branches initialised at 0.

    python benchmarks/first_gradient.py

The table shows the norm of the gradient at the first and the last convolution with a gradient, and the cosine between
the gradients in float32 and in bfloat16 at the first convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from timing import build_parser, print_table, start
from torch import Tensor
from torch.nn import functional as F

from foundation.config import load_config
from foundation.errors import run
from pretrain.batches.augment import augment
from pretrain.batches.views import Batch, ViewDataset
from pretrain.config import build_augmentations, get_defaults
from pretrain.images.sources import build_source
from pretrain.training.build import build_parts
from pretrain.training.dry_run import synthetic_batch


class Case(NamedTuple):
    """A recipe, and what to change in it."""

    recipe: str
    encoder: str
    batch: int
    changes: tuple[object, ...] = ()


CASES = [
    Case("shapes_R18", "resnet18", 256),
    Case("shapes_R18", "resnet50", 256),
    Case("imagenet1k_R50", "resnet50", 24),
]
QUICK = [Case("shapes_R18", "resnet18", 4, ("DATA.IMAGE_SIZE", 32, "PROJECTOR.DIMS", [16, 8]))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser("The first gradient in float32 and bfloat16.", threads=1, rounds=None).parse_args(argv)
    device = start(args)
    print_table(
        ["encoder", "pixels, batch", "residual branches", "first", "last", "cosine"],
        (
            measure(case, zero, args.quick, device)
            for case in (QUICK if args.quick else CASES)
            for zero in (False, True)
        ),
    )


def measure(case: Case, zero: bool, quick: bool, device: torch.device) -> list[str]:
    """A row of the table. `zero`: residual branches begin at 0."""
    changes = ("ENCODER.NAME", case.encoder, "ENCODER.ZERO_INIT_RESIDUAL", zero, *case.changes)
    config = load_config(get_defaults(), case.recipe, "pretrain", [str(change) for change in changes])
    batch = synthetic_batch(config, case.batch) if quick else pictures(config, case.batch)
    exact, rounded = (gradients(config, batch, device, bfloat16) for bfloat16 in (False, True))
    reached = [each for each in exact if each.any()]  # branches at 0 get none
    cosine = float(F.cosine_similarity(exact[0].flatten(), rounded[0].flatten(), dim=0))
    lengths = (f"{float(each.norm()):.3g}" for each in (reached[0], reached[-1]))
    begins = "at 0" if zero else "as torchvision begins them"
    size = f"{config.DATA.IMAGE_SIZE}, {case.batch}"
    return [f"{case.encoder}, {case.recipe}", size, begins, *lengths, f"{cosine:.3f}"]


def pictures(config: CfgNode, count: int) -> Batch:
    """Views of the first pictures of the embedded set, as the recipe draws them."""
    dataset = ViewDataset(
        build_source("shapes", "", "pretrain"), config.DATA.IMAGE_SIZE, build_augmentations(config), 0
    )
    return dataset.read([(0, index) for index in range(count)])


def gradients(config: CfgNode, batch: Batch, device: torch.device, bfloat16: bool) -> list[Tensor]:
    """Gradients of all convolutions, in the order of the forward pass."""
    mean, std = (torch.tensor(values, device=device) for values in (config.DATA.MEAN, config.DATA.STD))
    views = [augment(batch.images[v].to(device), batch.params[v], mean, std) for v in range(2)]
    torch.manual_seed(0)
    parts = build_parts(config, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        embeddings = parts["network"](*views)
    parts["criterion"](*embeddings).total.backward()
    return [each.grad for each in parts["network"].encoder.parameters() if each.ndim == 4]


if __name__ == "__main__":
    run(main)

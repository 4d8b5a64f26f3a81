"""The objective beside VICReg's, alone and in whole steps, as in thesis Table 5.8.

    python benchmarks/loss.py                   P from 64 to 1024
    python benchmarks/loss.py --large           2048, 4096 and 8192 as well
    python benchmarks/loss.py --whole-steps     instead thesis Table 5.8: seconds per epoch of CIFAR-10; slow on a CPU
    python benchmarks/loss.py --share           instead the objective's share of a step at the ImageNet-1K recipe

N is the batch size, P the dimension of the embedding. Timed are the loss and its gradient, of the same embeddings.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from step import CASES, QUICK, Case, encoder_pass, load
from timing import alternate, build_parser, print_table, ratio, start
from torch import Tensor
from torch.nn import functional as F

from foundation.config import load_config
from foundation.errors import run
from pretrain.config import get_defaults, resolve_precision
from pretrain.corinfomax import CorInfoMaxLoss
from pretrain.training.build import build_parts

Loss = Callable[[Tensor, Tensor], Tensor]
DIMS = [64, 128, 256, 512, 1024]
LARGE_DIMS = [2048, 4096, 8192]
CIFAR10_IMAGES = 50_000


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("Time of CorInfoMax and VICReg.", threads=0, rounds=9)
    parser.add_argument("--large", action="store_true", help="dimensions of the embedding up to 8192 too")
    parser.add_argument("--whole-steps", action="store_true", help="whole steps instead")
    parser.add_argument("--batch", type=int, default=512, help="of the whole steps (default: %(default)s)")
    parser.add_argument("--share", action="store_true", help="the objective's share of a step instead")
    args = parser.parse_args(argv)
    device = start(args)
    if args.quick:
        dims, counts, step_dims, batch, rounds, case = [8], [16], [8], 4, 1, QUICK
    else:
        dims, counts, step_dims, batch, rounds = DIMS, [512, 1536], DIMS, args.batch, args.rounds
        case = CASES["imagenet1k_R50"]
    dims = dims + LARGE_DIMS * (args.large and not args.quick)
    if args.quick or not (args.whole_steps or args.share):
        rows = (compare_losses(count, dim, rounds, device) for count in counts for dim in dims)
        print_table(["N", "P", "CorInfoMax, ms", "VICReg, ms", "VICReg / CorInfoMax"], rows)
    if args.quick or args.whole_steps:
        print()
        rows = (compare_steps(batch, dim, rounds, device) for dim in step_dims)
        print_table(["batch", "P", "CorInfoMax epoch, s", "VICReg epoch, s", "VICReg / CorInfoMax"], rows)
    if args.quick or args.share:
        print()
        header = ["N", "P", "objective, ms", "encoder, ms a pair", "objective's share of both"]
        print_table(header, [share_of_step(case, rounds, device)])


def build_losses(dim: int, device: torch.device) -> list[Loss]:
    """CorInfoMax, VICReg."""
    criterion = CorInfoMaxLoss(dim=dim, attraction=250.0, forgetting=0.01, eps=1e-8).to(device)
    return [lambda z1, z2: criterion(z1, z2).total, vicreg]


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """VICReg (Bardes et al., ICLR 2022, Eq. 1 to 6) with its weights 25, 25 and 1. z1, z2: (N, P)."""
    invariance = (z1 - z2).square().sum(dim=1).mean()
    variance, covariance = z1.new_zeros(()), z1.new_zeros(())
    for z in (z1, z2):
        variance = variance + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()
        centred = z - z.mean(dim=0)
        matrix = centred.T @ centred / (len(z) - 1)
        covariance = covariance + (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]
    return 25 * invariance + 25 * variance + covariance


def synthetic_embeddings(count: int, dim: int, device: torch.device) -> list[Tensor]:
    """Unit embeddings (N, P) of both views."""
    return [F.normalize(torch.randn(count, dim, device=device), dim=1).requires_grad_() for _ in range(2)]


def synthetic_views(count: int, side: int, device: torch.device) -> list[Tensor]:
    """Images of noise (N, 3, side, side) for both views, in the memory format of training."""
    views = [torch.randn(count, 3, side, side, device=device) for _ in range(2)]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def compare_losses(count: int, dim: int, rounds: int, device: torch.device) -> list[str]:
    """Forward and backward of both losses on unit embeddings."""
    z = synthetic_embeddings(count, dim, device)

    def differentiate(loss: Loss) -> None:
        torch.autograd.grad(loss(*z), z)

    seconds = alternate([partial(differentiate, loss) for loss in build_losses(dim, device)], rounds, device)
    return [f"{count}", f"{dim}", *(f"{1e3 * time:.3g}" for time in np.median(seconds, axis=0)), ratio(seconds, 0, 1)]


def compare_steps(batch: int, dim: int, rounds: int, device: torch.device) -> list[str]:
    """Whole steps of the CIFAR-10 recipe with both losses, which train one network in turns: seconds per epoch.

    Without reading and augmenting images, which both losses need alike.
    """
    config = load_config(get_defaults(), "cifar10_R18", "pretrain", ["PROJECTOR.DIMS", f"[2048, 2048, {dim}]"])
    parts = build_parts(config, device)
    network, optimizer = parts["network"], parts["optimizer"]
    views = synthetic_views(batch, config.DATA.IMAGE_SIZE, device)
    lower = resolve_precision(config.TRAIN.PRECISION, device) == "bfloat16"

    def step(loss: Loss) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            z1, z2 = network(*views)
        loss(z1, z2).backward()
        optimizer.step()

    seconds = alternate([partial(step, loss) for loss in build_losses(dim, device)], rounds, device)
    times = np.median(seconds, axis=0) * (CIFAR10_IMAGES // batch)
    return [f"{batch}", f"{dim}", *(f"{time:.4g}" for time in times), ratio(seconds, 0, 1)]


def share_of_step(case: Case, rounds: int, device: torch.device) -> list[str]:
    """The objective's time beside the encoder's, for the batch of a recipe.

    The encoder's forward and backward pass is timed on a batch that suits the device, and counted in proportion. The
    share is an upper bound of that in a step, to which projector, augmentation and optimizer belong too.
    """
    config = load(case)
    count, dim = config.TRAIN.BATCH_SIZE, config.PROJECTOR.DIMS[-1]
    pairs = case.batch(device)
    views = synthetic_views(pairs, config.DATA.IMAGE_SIZE, device)
    lower = resolve_precision(config.TRAIN.PRECISION, device) == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=lower)
    z = synthetic_embeddings(count, dim, device)
    objective = build_losses(dim, device)[0]
    sides = [
        lambda: torch.autograd.grad(objective(*z), z),
        partial(encoder_pass, build_parts(config, device)["network"], views, autocast),
    ]
    loss, encoder = np.median(alternate(sides, rounds, device), axis=0)
    share = loss / (loss + encoder * count / pairs)
    return [f"{count}", f"{dim}", f"{1e3 * loss:.3g}", f"{1e3 * encoder / pairs:.3g}", f"{share:.2%}"]


if __name__ == "__main__":
    run(main)

"""Each default of the training step against its alternative: is it worth being the default on this machine?

    python benchmarks/defaults.py [--device cuda] [--recipe imagenet1k_R50]

All are timed in turns with the step as it is; the table says how many times as long the alternative takes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from fvcore.common.config import CfgNode
from step import CASES, QUICK, build_trainer, synthetic_batch
from timing import alternate, build_parser, print_table, ratio, start
from torch import Tensor, nn

from cli.config import load_config
from pretrain.build import build_parts
from pretrain.config import get_defaults, resolve_precision
from pretrain.engine import Trainer


class Planar(nn.Module):
    """A network in NCHW memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Both views' embeddings."""
        return self.network(view1.contiguous(), view2.contiguous())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser("The defaults of the step against their alternatives.", threads=0, rounds=5)
    parser.add_argument("--recipe", choices=CASES, default="shapes_R18")
    parser.add_argument("--batch", type=int, default=0, help="another batch size")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; a CPU needs a C++ compiler")
    args = parser.parse_args(argv)
    device = start(args)
    case = QUICK if args.quick else CASES[args.recipe]
    config = load_config(get_defaults(), case.recipe, "pretrain", [str(change) for change in case.changes])
    size = args.batch or (case.cuda_batch if device.type == "cuda" else case.cpu_batch)
    batch = synthetic_batch(config, size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    names = ["float32", "NCHW", "unfused SGD"] + ["compiled"] * args.compile
    sides = [partial(build_variant(config, name, device).step, 0, batch) for name in ("default", *names)]
    seconds = alternate(sides, 1 if args.quick else args.rounds, device)
    rows = [[name, ratio(seconds, side=0, reference=place)] for place, name in enumerate(names, start=1)]
    print_table([f"instead of the default, {case.recipe}, batch {size}", "takes times as long"], rows)


def build_variant(config: CfgNode, variant: str, device: torch.device) -> Trainer:
    """The step with one choice made differently, or none."""
    parts = build_parts(config, device)
    if variant == "NCHW":
        parts["network"] = Planar(parts["network"])
    if variant == "compiled":
        parts["network"].compile()
    if variant == "unfused SGD":
        parts["optimizer"] = torch.optim.SGD(parts["network"].parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    precision = "float32" if variant == "float32" else resolve_precision(config.TRAIN.PRECISION, device)
    return build_trainer(config, parts, device, precision)


if __name__ == "__main__":
    main()

"""Time each default of the training step against its alternative on this machine.

    python benchmarks/defaults.py [--device cuda] [--recipe imagenet1k_R50]
    python benchmarks/defaults.py --prefetch            instead the number of batches that a worker fetches ahead

All are timed in turns with the default step; the table shows how many times as long the alternative takes.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from data import render_photographs
from fvcore.common.config import CfgNode
from step import CASES, QUICK, build_trainer, load
from timing import alternate, build_parser, print_table, ratio, start
from torch import Tensor, nn

from foundation.errors import run
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import ShuffledBatches
from pretrain.batches.views import Batch, ViewDataset
from pretrain.config import build_augmentations, resolve_precision
from pretrain.images.sources import Source
from pretrain.training.build import build_parts
from pretrain.training.cuda_graph import capture_step, uses_graph
from pretrain.training.dry_run import synthetic_batch
from pretrain.training.step import Trainer

WITHOUT_GRAPH = "no CUDA graph"
AHEAD = 2  # batches for each worker, PyTorch's default and ours


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
    parser.add_argument("--prefetch", action="store_true", help="the batches fetched ahead instead, on the wall clock")
    args = parser.parse_args(argv)
    device = start(args)
    rounds = 1 if args.quick else args.rounds
    case = QUICK if args.quick else CASES[args.recipe]
    config = load(case)
    size = args.batch or case.batch(device)
    rows = [] if args.prefetch else compare_steps(config, size, rounds, device, compiled=args.compile)
    if args.prefetch or args.quick:
        rows += compare_prefetching(config, size, rounds, device)
    print_table([f"instead of the default, {case.recipe}, batch {size}", "takes times as long"], rows)


def compare_steps(config: CfgNode, size: int, rounds: int, device: torch.device, compiled: bool) -> list[list[str]]:
    """The step on a batch in memory."""
    batch = synthetic_batch(config, size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    names = ["float32", "NCHW", "unfused SGD"] + ["compiled"] * compiled
    if uses_graph(config, device, size):
        names.append(WITHOUT_GRAPH)
    sides = [partial(build_variant(config, name, device, size).step, 0, batch) for name in ("default", *names)]
    if device.type == "cuda":
        names.append("cuDNN's own choice of convolutions")
        with without_search():
            trainer = build_variant(config, "default", device, size)
        sides.append(partial(step_without_search, trainer, batch))
    seconds = alternate(sides, rounds, device)
    return [[name, ratio(seconds, side=0, reference=place)] for place, name in enumerate(names, start=1)]


def step_without_search(trainer: Trainer, batch: Batch) -> None:
    """A step in which cuDNN does not try which of its convolutions is the fastest."""
    with without_search():
        trainer.step(0, batch)


@contextmanager
def without_search() -> Iterator[None]:
    """While entered, cuDNN chooses its convolutions by itself."""
    torch.backends.cudnn.benchmark = False
    yield
    torch.backends.cudnn.benchmark = True


def compare_prefetching(config: CfgNode, size: int, rounds: int, device: torch.device) -> list[list[str]]:
    """A few steps fed by one worker, on photographs."""
    trainer, others = build_variant(config, "default", device, size), (1, 4)
    with tempfile.TemporaryDirectory() as folder:
        source = render_photographs(Path(folder), size)
        sides = [partial(take_steps, trainer, config, source, ahead) for ahead in (AHEAD, *others)]
        seconds = alternate(sides, rounds, device, waiting=True)
    rows = enumerate(others, start=1)
    return [[f"{ahead} fetched ahead", ratio(seconds, side=0, reference=place)] for place, ahead in rows]


def take_steps(trainer: Trainer, config: CfgNode, source: Source, ahead: int, steps: int = 8) -> None:
    """Steps on batches of all images, fetched by one worker."""
    batches = ShuffledBatches(len(source), batch_size=len(source), seed=0, first_step=0, last_step=steps)
    dataset = ViewDataset(source, config.DATA.IMAGE_SIZE, build_augmentations(config))
    loader = build_loader(dataset, batches, workers=1, device=trainer.device)
    loader.prefetch_factor = ahead
    for step, batch in enumerate(read_batches(loader)):
        trainer.step(step, batch)


def build_variant(config: CfgNode, variant: str, device: torch.device, size: int) -> Trainer:
    """The step with one choice made differently, or none. `size`: pairs of a batch."""
    parts = build_parts(config, device)
    if variant == "NCHW":
        parts["network"] = Planar(parts["network"])
    if variant == "compiled":
        parts["network"].compile()
    if variant == "unfused SGD":
        parts["optimizer"] = torch.optim.SGD(parts["network"].parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    precision = "float32" if variant == "float32" else resolve_precision(config.TRAIN.PRECISION, device)
    trainer = build_trainer(config, parts, device, precision)
    if uses_graph(config, device, size) and variant not in (WITHOUT_GRAPH, "compiled"):
        capture_step(trainer, size, config.DATA.IMAGE_SIZE)
    return trainer


if __name__ == "__main__":
    run(main)

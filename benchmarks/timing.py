"""Time two sides of a comparison in turns, so that a busy machine affects both equally; and print the tables."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision

from foundation.devices import report_out_of_memory
from foundation.errors import ArgumentParser, UserError

Side = Callable[[], object]


def build_parser(description: str, threads: int, rounds: int | None, gpu: bool = True) -> ArgumentParser:
    """The options that all benchmarks share.

    Args:
        description: the first line of `--help`.
        threads: default of `--threads`.
        rounds: default of `--rounds`; None for a benchmark that does not alternate, which then lacks this option.
        gpu: whether there is an option `--device`.
    """
    parser = ArgumentParser(description=description)
    if gpu:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="measure on (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=threads, help="of PyTorch on the CPU; 0: its own choice (default: %(default)s)"
    )
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help="of A B A B ..., after one to warm up (default: %(default)s)"
        )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Set the threads and the seed, print what is measured on, and return the device.

    Raises:
        UserError: `--threads` or `--rounds` is too small, or PyTorch has no GPU for `--device cuda`.
    """
    for name, least in (("threads", 0), ("rounds", 1)):
        if getattr(args, name, least) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be {least} or greater")
    device = find_device(getattr(args, "device", "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in pretraining
    print(describe_machine(device), flush=True)
    return device


def find_device(name: str) -> torch.device:
    """The device `cpu` or `cuda`. Raises UserError where PyTorch cannot use a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: PyTorch {torch.__version__} finds no GPU that it can use; see nvidia-smi")
    return torch.device(name)


def describe_machine(device: torch.device) -> str:
    """One line: processor, cores, threads, load and versions."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    name = torch.cuda.get_device_name(device) + ", " if device.type == "cuda" else ""
    return (
        f"{name}{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}"
    )


@report_out_of_memory("choose smaller sizes, such as another --batch")
def alternate(sides: Sequence[Side], rounds: int, device: torch.device, waiting: bool = False) -> np.ndarray:
    """Seconds that each side takes in each round, (rounds, sides): A B A B ..., after one round to warm up.

    With one thread on a CPU it is the process's computing time, in which the time that other programs took away is
    not counted; else it is time on the wall, with a GPU's queue empty before and after.

    Args:
        waiting: whether to count the time that a side waits, such as for loader workers, in any case.

    Raises:
        UserError: memory ran out.
    """
    clock = time.perf_counter if waiting else clock_for(device)
    seconds = np.zeros((rounds + 1, len(sides)))
    for row in seconds:
        for place, side in enumerate(sides):
            wait_for(device)
            began = clock()
            side()
            wait_for(device)
            row[place] = clock() - began
    return seconds[1:]


def clock_for(device: torch.device) -> Callable[[], float]:
    """Computing time of the process with one thread on a CPU, else time on the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has no work left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: np.ndarray, side: int, reference: int) -> str:
    """How many times as long the reference takes: the median over the rounds, and the middle half of them."""
    ratios = seconds[:, reference] / seconds[:, side]
    low, high = np.quantile(ratios, (0.25, 0.75))
    return f"{median(ratios):.3g} ({low:.3g}–{high:.3g})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, aligned.

    Args:
        header: names of the columns.
        rows: each as long as the header. If they are measured while they are iterated over and that is interrupted or
            fails, the rows measured until then are printed before the exception is passed on.
    """
    cells = [list(header)]
    try:
        for row in rows:
            cells.append(list(row))
    finally:
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        cells.insert(1, ["-" * width for width in widths])
        for row in cells:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        sys.stdout.flush()

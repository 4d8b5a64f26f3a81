"""Everything that only a GPU can answer, in one command of nine minutes at most: `make gpu`.

    python benchmarks/gpu.py --output DIR [--fashion DIR] [--minutes 9]

The parts run in this order, the most important first, each as a process of its own with a time limit:

- tests: the tests with the marker `cuda`;
- step: pairs a second of the training step, ResNet-18 at small and ResNet-50 at 224 pixels (`step.py`);
- detector: seconds an iteration and an image, C4 and FPN at COCO's size (`detector.py`);
- loss: the objective beside VICReg's, P from 64 to 8192 (`loss.py`);
- fashion_mnist: the recipe for as many epochs as fit in the rest of the time, then kNN and linear accuracy.

After each part DIR/gpu.json and DIR/gpu.md are written. Called again with the same DIR, it continues behind the parts
that are complete. A part that fails does not stop the others; the exit status is then 1.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import describe_machine

from foundation.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
EPOCHS_MOST = 100  # of Fashion-MNIST
START_UP = 20.0  # seconds of a run that are not training: imports, files, the linear evaluation after it is apart
LINEAR = 60.0  # seconds for the linear evaluation
Part = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are not complete, and write what they found."""
    args = build_parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    path = args.output / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    found["machine"] = describe_machine(torch.device(args.device))
    print(found["machine"], flush=True)
    for name in args.parts:
        if found["parts"].get(name, {}).get("complete"):
            print(f"{name}: complete already", flush=True)
            continue
        left = end - time.monotonic()
        if left < MINIMUM[name]:
            print(f"{name}: left out, {left:.0f} s are too few", flush=True)
            continue
        print(f"{name}: at most {min(left, MOST[name]):.0f} s", flush=True)
        found["parts"][name] = RUN[name](args, min(left, MOST[name]))
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(args.output / "gpu.md", describe(found).encode())
    print(f"{args.output / 'gpu.md'}")
    if not all(part["complete"] for part in found["parts"].values()):
        raise SystemExit(1)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="Everything that only a GPU can answer.")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--fashion", default="", help="folder with Fashion-MNIST's files; default: as DATA.ROOT")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts")
    parser.add_argument("--parts", nargs="+", choices=RUN, default=list(RUN), help="parts to run")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # the tests run the command on a CPU
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser


def call(command: Sequence[str], seconds: float) -> Part:
    """Run a command of this Python within a time limit, its output shown as it comes.

    Returns:
        `complete` (exit status 0), `seconds`, and `output`, with what it printed to both streams.
    """
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        ["timeout", "--signal=INT", "--kill-after=10", f"{seconds:.0f}", sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        print(f"    {line}", end="", flush=True)
    status = process.wait()
    return {"complete": status == 0, "seconds": round(time.monotonic() - began, 1), "output": "".join(lines)[-20_000:]}


def run_tests(args: argparse.Namespace, seconds: float) -> Part:
    """The tests that need a GPU; no test at all is a failure as well."""
    part = call(["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests"], seconds)
    return {**part, "summary": (part["output"].strip().splitlines() or [""])[-1]}


def benchmark(script: str, *options: str) -> Callable[[argparse.Namespace, float], Part]:
    """A script of this folder, with the rows of the tables that it prints."""

    def run(args: argparse.Namespace, seconds: float) -> Part:
        quick = ["--quick"] if args.quick else list(options)
        part = call([f"benchmarks/{script}.py", "--device", args.device, *quick], seconds)
        return {**part, "rows": read_tables(part["output"])}

    return run


def read_tables(text: str) -> list[dict[str, str]]:
    """The rows of all Markdown tables in a text, by the names of their columns."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set("".join(cells)) <= set("-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def run_fashion_mnist(args: argparse.Namespace, seconds: float) -> Part:
    """One epoch to know its duration, then as many as fit, and the evaluation beside an untrained encoder."""
    folder = args.output / "fashion_mnist"
    root = ["DATA.ROOT", args.fashion] if args.fashion else []
    small = ["DATA.IMAGE_SIZE", "32", "TRAIN.MAX_STEPS", "2", "PROJECTOR.DIMS", "[16,8]"] if args.quick else []
    pretrain = ["pretrain/train.py", "--config", "fashion_mnist_R18"]
    end = time.monotonic() + seconds - 2 * LINEAR
    first = call([*pretrain, "--output", f"{folder}/epoch", "TRAIN.EPOCHS", "1", *root, *small, *NO_WARM_UP], seconds)
    if not first["complete"]:
        return first
    epochs = fitting_epochs(first["seconds"], end - time.monotonic())
    options = [f"{folder}/run", "TRAIN.EPOCHS", f"{epochs}", *root, *small]
    part = call([*pretrain, "--output", *options, *(NO_WARM_UP if epochs == 1 else [])], seconds)
    accuracy = {}
    for name, weights in (("untrained", "random"), ("corinfomax", f"{folder}/run")):
        linear = ["pretrain/linear.py", "--config", "fashion_mnist_R18", "--weights", weights]
        shrunk = ["DATA.IMAGE_SIZE", "32", "TRAIN.EPOCHS", "1"] if args.quick else []
        evaluated = call([*linear, "--output", f"{folder}/{name}", *root, *shrunk], 2 * LINEAR)
        part["complete"] = part["complete"] and evaluated["complete"]
        results = folder / name / "results.json"
        accuracy[name] = json.loads(results.read_text()) if results.exists() else {}
    return {**part, "epochs": epochs, "seconds_of_one_epoch_run": first["seconds"], "accuracy": accuracy}


def fitting_epochs(one: float, left: float) -> int:
    """Epochs that fit in `left` seconds, from the seconds of a whole run of one epoch."""
    epoch = max(one - START_UP, one / 4)
    return max(1, min(EPOCHS_MOST, int((left - START_UP) / epoch)))


def describe(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["# Measured on a GPU", "", found["machine"], ""]
    for name, part in found["parts"].items():
        state = "" if part["complete"] else ", NOT COMPLETE"
        lines += [f"## {name} ({part['seconds']:g} s{state})", ""]
        rows = part.get("rows", [])
        for row, before in zip(rows, [{}, *rows], strict=False):
            if list(row) != list(before):
                lines += ["", f"| {' | '.join(row)} |", f"|{' --- |' * len(row)}"]
            lines.append(f"| {' | '.join(row.values())} |")
        if "summary" in part:
            lines.append(part["summary"])
        for encoder, results in part.get("accuracy", {}).items():
            values = {key: results.get(key) for key in ("knn_top1", "linear_top1")}
            lines.append(f"- {encoder}, {part['epochs']} epochs: {json.dumps(values)}")
        if not part["complete"]:
            lines += ["", "    " + "\n    ".join(part["output"].splitlines()[-20:])]
        lines.append("")
    return "\n".join(lines)


NO_WARM_UP = ["TRAIN.WARMUP_EPOCHS", "0"]
RUN: dict[str, Callable[[argparse.Namespace, float], Part]] = {
    "tests": run_tests,
    "step": benchmark("step"),
    "detector": benchmark("detector", "--part", "models"),
    "loss": benchmark("loss", "--large"),
    "fashion_mnist": run_fashion_mnist,
}
MOST = {"tests": 120.0, "step": 90.0, "detector": 120.0, "loss": 45.0, "fashion_mnist": 360.0}  # seconds
MINIMUM = {"tests": 20.0, "step": 20.0, "detector": 40.0, "loss": 20.0, "fashion_mnist": 150.0}


if __name__ == "__main__":
    main()

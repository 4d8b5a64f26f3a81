"""Everything that only a GPU can answer, in one command of nine minutes at most: `make gpu`.

    python benchmarks/gpu.py --output DIR [--fashion DIR] [--minutes 9]

The parts run in this order, the most important first, each as processes of its own with a time limit:

- tests: the tests with the marker `cuda`;
- step: pairs a second of the training step, ResNet-18 at small and ResNet-50 at 224 pixels (`step.py`);
- detector: seconds an iteration and an image, C4 and FPN at COCO's size (`detector.py`);
- loss: the objective beside VICReg's, P from 64 to 8192 (`loss.py`);
- fashion_mnist: the recipe for as many epochs as fit in the rest of the time, then kNN and linear accuracy.

DIR/gpu.json and DIR/gpu.md are written after each part, and within fashion_mnist after each run. Called again with the
same DIR, it leaves complete parts as they are and continues with the others. The runs of fashion_mnist are in the
folder `--runs`, where they are resumed. A part that fails does not stop the others. The exit status is 1 while a part
is not complete.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from timing import describe_machine, find_device

from foundation.errors import ArgumentParser, UserError, run
from foundation.files import make_folder, write_atomic

ROOT = Path(__file__).resolve().parents[1]
EPOCHS_MOST = 100  # of Fashion-MNIST
START_UP = 20.0  # seconds of a pretraining that are not epochs: imports, files
LINEAR = 60.0  # seconds for one linear evaluation
GRACE = 10.0  # seconds that a process has after SIGINT, to print or save what it has
# Modules of the requirements, by import name: those without which no part runs, and those of the detector.
NEEDED = (
    *("fvcore", "iopath", "yacs", "yaml", "termcolor", "tabulate", "portalocker", "PIL", "simplejpeg", "safetensors"),
    *("tensorboard", "tqdm", "filelock", "matplotlib", "sklearn", "scipy", "contourpy", "pytest"),
)
NEEDED_BY_DETECTOR = (
    *("detectron2", "pycocotools", "faster_coco_eval", "omegaconf", "hydra", "cloudpickle", "packaging"),
)
Part = dict[str, Any]  # `complete`, `seconds`, `output`; then what is particular to the part


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are not complete, and write what they found.

    Raises:
        UserError: there is no GPU, a module is missing, or the folder holds something else.
    """
    args = build_parser().parse_args(argv)
    args.output, args.runs = args.output.resolve(), args.runs.resolve()  # the parts run in the repository's root
    args.fashion = args.fashion and str(Path(args.fashion).resolve())
    if missing := find_missing(NEEDED):
        raise UserError(
            f"{sys.executable} lacks {', '.join(missing)}: install requirements.txt, or name another Python"
        )
    if missing := find_missing(NEEDED_BY_DETECTOR):
        print(f"warning: the detector's measurements and tests need {', '.join(missing)}", file=sys.stderr)
    machine = describe_machine(find_device(args.device))
    make_folder(args.output)
    make_folder(args.runs)
    found = read_results(args.output / "gpu.json")
    print(machine, flush=True)
    end = time.monotonic() + 60 * args.minutes - GRACE
    for name in args.parts:
        if found.get(name, {}).get("complete"):
            print(f"{name}: complete already", flush=True)
            continue
        left = end - time.monotonic()
        if left < MINIMUM[name]:
            print(f"{name}: left out, {left:.0f} s are too few", flush=True)
            continue
        print(f"{name}: at most {min(left, MOST[name]):.0f} s", flush=True)
        for part in RUN[name](args, min(left, MOST[name])):
            found[name] = {"machine": machine, **part}
            write_results(args.output, found)
    if not all(found.get(name, {}).get("complete") for name in args.parts):
        print("not complete; the same command continues", flush=True)
        raise SystemExit(1)
    print(args.output / "gpu.md")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks/gpu.py", description="Everything that only a GPU can answer.")
    default = ROOT / "output"
    parser.add_argument("--output", type=Path, default=default / "gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--runs", type=Path, default=default / "gpu_runs", help="folder for the runs of Fashion-MNIST")
    parser.add_argument("--fashion", default="", help="folder with Fashion-MNIST's files; default: as DATA.ROOT")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=RUN, default=list(RUN), help="parts to run, in this order")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # the tests run the command on a CPU
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser


def find_missing(modules: Sequence[str]) -> list[str]:
    """Those modules that this Python cannot import; none of them is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def read_results(path: Path) -> dict[str, Part]:
    """The parts of an earlier call, by name.

    Raises:
        UserError: the file is not one that this command writes.
    """
    try:
        found = json.loads(path.read_text())
        # Files of earlier versions name the machine once.
        return {name: {"machine": found.get("machine", ""), **part} for name, part in found["parts"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be continued ({error!r}); choose another --output") from error


def write_results(folder: Path, found: dict[str, Part]) -> None:
    """Write gpu.json and gpu.md."""
    write_atomic(folder / "gpu.json", (json.dumps({"parts": found}, indent=1) + "\n").encode())
    write_atomic(folder / "gpu.md", describe(found).encode())


def call(command: Sequence[str], seconds: float) -> Part:
    """Run a command of this Python within a time limit, its output shown as it comes.

    At the limit, or when this process is interrupted, the command gets SIGINT. `GRACE` seconds later it is killed with
    all its processes.

    Returns:
        `complete` (exit status 0), `seconds`, and `output`, with what it printed to both streams.
    """
    began = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    assert process.stdout is not None
    limits = [
        threading.Timer(max(seconds, 0), process.send_signal, [signal.SIGINT]),
        threading.Timer(max(seconds, 0) + GRACE, kill_group, [process]),
    ]
    lines = []
    try:
        for limit in limits:
            limit.start()
        for line in process.stdout:
            lines.append(line)
            print(f"    {line}", end="", flush=True)
        status = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        for limit in limits:
            limit.cancel()
        kill_group(process)
    return {"complete": status == 0, "seconds": round(time.monotonic() - began, 1), "output": "".join(lines)[-20_000:]}


def kill_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(args: argparse.Namespace, seconds: float) -> Iterator[Part]:
    """The tests that need a GPU; no test at all is a failure as well."""
    part = call(["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *files_with_gpu_tests()], seconds)
    yield {**part, "summary": (part["output"].strip().splitlines() or [""])[-1]}


def files_with_gpu_tests() -> list[str]:
    """The test files that use the marker: to collect the whole suite would take a large part of the time."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.cuda" in path.read_text(encoding="utf-8")]


def benchmark(script: str, *options: str) -> Callable[[argparse.Namespace, float], Iterator[Part]]:
    """A script of this folder, with the rows of the tables that it prints."""

    def measure(args: argparse.Namespace, seconds: float) -> Iterator[Part]:
        quick = ["--quick"] if args.quick else []
        part = call([f"benchmarks/{script}.py", "--device", args.device, *options, *quick], seconds)
        yield {**part, "rows": read_tables(part["output"])}

    return measure


def read_tables(text: str) -> list[dict[str, str]]:
    """The rows of all Markdown tables in a text, by the names of their columns. Rows of another length are left out."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif len(cells) == len(header) and not set("".join(cells)) <= set("-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def run_fashion_mnist(args: argparse.Namespace, seconds: float) -> Iterator[Part]:
    """Pretrain for as many epochs as fit, then evaluate the encoder beside an untrained one.

    The number of epochs follows from the duration of a run of one epoch. It is kept in `--runs` with the machine, so
    that a later call resumes the same run and names where it began.

    Yields:
        What is known after each run; `complete` in the last one, if all are.
    """
    began = time.monotonic()
    end = began + seconds
    options = ["--config", "fashion_mnist_R18", "DATA.WORKERS", f"{workers()}"]
    options += ["DATA.ROOT", args.fashion] if args.fashion else []
    small = ["DATA.IMAGE_SIZE", "32", "TRAIN.MAX_STEPS", "2", "PROJECTOR.DIMS", "[16,8]"] if args.quick else []
    pretrain = ["pretrain/train.py", *options, *small]
    shrunk = ["DATA.IMAGE_SIZE", "32", "TRAIN.EPOCHS", "1"] if args.quick else []
    part: Part = {"complete": False, "seconds": 0.0, "output": "", "accuracy": {}}

    def attempt(command: list[str], limit: float) -> bool:
        done = call(command, limit - time.monotonic())
        part.update(complete=False, seconds=round(time.monotonic() - began, 1), output=done["output"])
        return done["complete"]

    plan = args.runs / "plan.json"
    if not plan.exists():
        shutil.rmtree(args.runs / "epoch", ignore_errors=True)  # of a call that was interrupted: it is timed as a whole
        if not attempt([*pretrain, "--output", f"{args.runs}/epoch", "TRAIN.EPOCHS", "1"], end):
            yield part
            return
        epochs = fitting_epochs(part["seconds"], end - 2 * LINEAR - time.monotonic())
        begun = {"machine": describe_machine(find_device(args.device)), "epochs": epochs}
        write_atomic(plan, json.dumps({**begun, "seconds_of_one_epoch_run": part["seconds"]}).encode())
    part.update(json.loads(plan.read_text()))
    run_folder = args.runs / "run"
    if not (run_folder / "encoder.safetensors").exists():  # written last
        chosen = ["--output", f"{run_folder}", "--resume", "TRAIN.EPOCHS", f"{part['epochs']}"]
        complete = attempt([*pretrain, *chosen], end)
        yield part
        if not complete:
            return
    encoders = {"corinfomax": f"{run_folder}", "untrained": "random"}
    for name, weights in encoders.items():
        results = args.runs / name / "results.json"
        if not results.exists():  # written last
            chosen = ["--weights", weights, "--output", f"{args.runs}/{name}", "--resume"]
            if not attempt(["pretrain/linear.py", *options, *chosen, *shrunk], end):
                yield part
                return
        part["accuracy"][name] = json.loads(results.read_text())
        part["complete"] = len(part["accuracy"]) == len(encoders)
        yield part


def fitting_epochs(one: float, left: float) -> int:
    """Epochs that fit in `left` seconds, from the seconds of a whole run of one epoch."""
    epoch = max(one - START_UP, one / 4, 0.1)
    return max(1, min(EPOCHS_MOST, int((left - START_UP) / epoch)))


def workers() -> int:
    """Loader processes: half of the cores, at most eight. The images that they give do not depend on their number."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def describe(found: dict[str, Part]) -> str:
    """What was found, as Markdown."""
    lines = ["# Measured on a GPU", ""]
    for name, part in found.items():
        state = "" if part["complete"] else ", NOT COMPLETE"
        lines += [f"## {name} ({part['seconds']:g} s{state})", "", part["machine"], ""]
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


RUN: dict[str, Callable[[argparse.Namespace, float], Iterator[Part]]] = {
    "tests": run_tests,
    "step": benchmark("step"),
    "detector": benchmark("detector", "--part", "models"),
    "loss": benchmark("loss", "--large"),
    "fashion_mnist": run_fashion_mnist,
}
MOST = {"tests": 150.0, "step": 90.0, "detector": 120.0, "loss": 45.0, "fashion_mnist": 360.0}  # seconds
MINIMUM = {"tests": 20.0, "step": 20.0, "detector": 40.0, "loss": 20.0, "fashion_mnist": 150.0}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `call` ends its processes
    run(main)

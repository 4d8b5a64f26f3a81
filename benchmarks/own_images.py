"""Measure whether pretraining on your own images improves a detector: sets, arms, labels, seeds, a table and a plot.

    python benchmarks/own_images.py DATA OUT --clipart FOLDER --wallpapers FOLDER...     everything: days of two cores
    python benchmarks/own_images.py DATA OUT --sets garments --seeds 0                   parts of it
    python benchmarks/own_images.py DATA OUT --only table                                the table of the finished runs

DATA gets the two sets, `clipart` and `garments` (clipart.py and garments.py beside this file), unless they are there.
For each set OUT/SET gets, in this order: `pretrain_ARM_seedSEED`, the encoder that the plan for own images pretrains on
the unlabelled scenes; `probe_ARM_seedSEED`, kNN and linear accuracy on single objects; `detection_ARM_LABELS_seedSEED`,
detectors from random weights and from the encoder, on all labelled scenes and on a tenth of them. A seed is that of the
pretraining, of the choice of the labelled scenes and of the detector.

`--arm NAME --change KEY VALUE ...` pretrains with other values, `--arm NAME --weights FILE` from existing weights. An
arm whose encoder is in OUT/SET/ARM_seedSEED.pkl is not pretrained. Each run is the command that the log shows. Finished
runs are left as they are, and interrupted ones are resumed.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from foundation.errors import ArgumentParser, UserError
from foundation.errors import run as start

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETS = ("clipart", "garments")
RANDOM, OURS = "random", "corinfomax"
LABELS = {400: 1.0, 40: 0.1}  # labelled scenes, and their share of the set's
FINISHED = "results.json"
# What the plan chooses on a CPU, given here so that it is the same on a GPU. All else is the plan's.
PLAN = ("--encoder", "resnet18", "--batch-size", 128)
VIEWS = ("DATA.IMAGE_SIZE", 48)
CLASSES = ("animals", "transportation", "people", "plants", "signs_and_symbols/flags")  # of the clip art
# On top of shapes_R18_FPN: boxes alone, scenes of 128 pixels. All keys of the plan for own data are given, so that all
# arms have the same; a share of the scenes takes share^0.25 of the iterations.
DETECTION = (
    *("MODEL.MASK_ON", False, "MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64],[128]]"),
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(128,)",
        "INPUT.MIN_SIZE_TEST",
        128,
        "INPUT.MAX_SIZE_TRAIN",
        256,
        "INPUT.MAX_SIZE_TEST",
        256,
    ),
    *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 600, "SOLVER.STEPS", "(500,)"),
    *("SOLVER.WARMUP_ITERS", 50, "SOLVER.CHECKPOINT_PERIOD", 500, "SOLVER.FRACTION_EXPONENT", 0.25),
    *("TEST.EVAL_PERIOD", 0, "TEST.PRECISE_BN.NUM_ITER", 20),
)
PROBE = ("DATA.NAME", "folder", "DATA.WORKERS", 0, "TRAIN.EPOCHS", 30)  # on top of shapes_R18
PARTS = ("sets", "pretrain", "probe", "detection", "table", "figure")
TITLES = {"clipart": "clip art", RANDOM: "random weights", OURS: "CorInfoMax"}  # in the plot; other names as they are
COLOURS = ("#8a8a8a", "#1f6fb4", "#d1792c", "#3d8f4a", "#8a5fb0", "#b0413e")  # of up to six arms


class Cell(NamedTuple):
    """Values of the runs that differ in their seed alone."""

    values: list[float]

    def __str__(self) -> str:
        if not self.values:
            return ""
        spread = f" ± {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{statistics.mean(self.values):.1f}{spread} ({', '.join(f'{value:.1f}' for value in self.values)})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table.

    Raises:
        UserError: the name of the arm cannot be used, or a set is missing and there is nothing to make it from.
    """
    args = build_parser().parse_args(argv)
    if "_" in args.arm or args.arm == RANDOM:
        raise UserError(f"--arm is {args.arm!r}; choose a name without '_', which separates the parts of a run's name")
    if "sets" in args.only:
        make_sets(args)
    for seed in args.seeds:
        for name in args.sets:
            if "pretrain" in args.only:
                pretrain(args, name, seed)
            if "probe" in args.only:
                probe(args, name, seed)
            for labels in args.labels:
                for arm in (RANDOM, args.arm):
                    if "detection" in args.only:
                        detect(args, name, arm, labels, seed)
    if "table" in args.only:
        print("\n".join(table(args.out)))
    if "figure" in args.only:
        draw(args.out, args.out / "own_images.png")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=absolute, help="folder of the sets")
    add("out", type=absolute, help="folder of the runs")
    add("--clipart", type=absolute, help="usr/share/openclipart/png of the unpacked package, to make the set")
    add("--wallpapers", type=absolute, nargs="+", default=[], help="folders of wallpapers, to make the set")
    add("--fashion", type=absolute, help="folder of Fashion-MNIST, to make the set")
    add("--sets", nargs="+", choices=SETS, default=SETS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--labels", nargs="+", type=int, choices=[*LABELS], default=[*LABELS])
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to do")
    add("--arm", default=OURS, help="name of the pretrained arm (%(default)s)")
    add("--epochs", type=int, default=109, help="of the pretraining (%(default)s, 5,014 steps)")
    add("--weights", type=absolute, help="file that the pretraining of --arm begins from")
    add("--change", nargs="+", default=[], metavar="KEY VALUE", help="keys of the pretraining to change, of --arm")
    add("--threads", type=int, default=0, help="of each run; 0: PyTorch's choice")
    return parser


def absolute(path: str) -> Path:
    """The path for a process that runs in another folder."""
    return Path(path).absolute()


def make_sets(args: argparse.Namespace) -> None:
    """Make the sets that are not there, each under a temporary name until it is complete.

    Raises:
        UserError: a set is incomplete, or there is nothing to make it from.
    """
    commands = {
        "clipart": ["--clipart", args.clipart, "--classes", *CLASSES] if args.clipart else [],
        "garments": ["--wallpapers", *args.wallpapers] if args.wallpapers else [],
    }
    if args.fashion and args.wallpapers:
        commands["garments"] += ["--fashion", args.fashion]
    for name in args.sets:
        folder = args.data / name
        if (folder / "folder" / "val").is_dir():  # written last
            continue
        if folder.exists():
            raise UserError(f"{folder} is not complete; delete it, and it is made anew")
        if not commands[name]:
            needed = {"clipart": "--clipart FOLDER", "garments": "--wallpapers FOLDER..."}[name]
            raise UserError(f"{folder} does not exist; {needed} makes it (see the first lines of {name}.py)")
        draft = args.data / f"{name}.partial"
        run(args, HERE / f"{name}.py", draft, *commands[name])
        draft.rename(folder)


def pretrain(args: argparse.Namespace, name: str, seed: int) -> None:
    """Pretrain on the set's unlabelled scenes."""
    folder = pretraining(args, name, seed)
    if not (folder / "encoder.safetensors").is_file() and not weights_file(args, name, seed).is_file():
        begin = ["--weights", args.weights] if args.weights else []
        chosen = ["--output", folder, "--resume", *PLAN, "--epochs", args.epochs, *begin]
        run(args, "pretrain/train.py", args.data / name / "unlabelled", *chosen, *VIEWS, "SEED", seed, *args.change)


def probe(args: argparse.Namespace, name: str, seed: int) -> None:
    """Evaluate the frozen encoders on single objects."""
    for arm in (RANDOM, args.arm):
        folder = args.out / name / f"probe_{arm}_seed{seed}"
        if not (folder / FINISHED).is_file():
            weights = RANDOM if arm == RANDOM else converted(args, name, seed)
            chosen = ["--config", "shapes_R18", "--weights", weights, "--output", folder, "--resume"]
            run(args, "pretrain/linear.py", *chosen, *PROBE, "DATA.ROOT", args.data / name / "folder", "SEED", seed)


def detect(args: argparse.Namespace, name: str, arm: str, labels: int, seed: int) -> None:
    """Fine-tune a detector on so many of the labelled scenes, which the seed chooses, and evaluate it."""
    folder, data = args.out / name / f"detection_{arm}_{labels}_seed{seed}", args.data / name
    if (folder / FINISHED).is_file():
        return
    weights: list[str | Path] = []
    if arm != RANDOM:
        weights = ["--weights", converted(args, name, seed)]
    files: list[str | Path] = ["--train-json", data / "train.json", "--train-images", data / "train"]
    files += ["--test-json", data / "val.json", "--test-images", data / "val"]
    share = ["DATASETS.FRACTION", LABELS[labels], "DATASETS.FRACTION_SEED", seed, *DETECTION]
    chosen = ["--config", "shapes_R18_FPN", "--output", folder, "--resume", *weights, *files]
    run(args, "detection/train_net.py", *chosen, "SEED", seed, *share)


def pretraining(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of the arm's pretraining."""
    return Path(args.out / name / f"pretrain_{args.arm}_seed{seed}")


def weights_file(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where the arm's encoder is, as a detector reads it."""
    return Path(args.out / name / f"{args.arm}_seed{seed}.pkl")


def converted(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The arm's encoder as a detector reads it, which is made if it is not there."""
    path = weights_file(args, name, seed)
    if not path.is_file():
        run(args, "convert/to_d2.py", pretraining(args, name, seed), path)
    return path


def run(args: argparse.Namespace, *words: object) -> None:
    """Run one of the project's commands. Leaves with its status if it fails."""
    command = [sys.executable, *map(str, words)]
    print(" ".join(["python", *command[1:]]), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            status = process.wait()
        except BaseException:  # a signal came to this process only; a run saves a checkpoint before it ends
            process.terminate()
            raise
    if status:
        raise SystemExit(status)


def table(out: Path) -> Iterator[str]:
    """What the finished runs have found, as Markdown."""
    yield "| set | encoder | kNN top-1 | linear top-1 |"
    yield "|---|---|---|---|"
    for name in SETS:
        for arm in find_arms(out, name, "probe_*_seed*"):
            found = [json.loads(path.read_text()) for path in finished(out, name, f"probe_{arm}_seed*")]
            cells = " | ".join(str(Cell([one[key] for one in found])) for key in ("knn_top1", "linear_top1"))
            yield f"| {name} | {arm} | {cells} |"
    yield ""
    yield "| set | labelled scenes | encoder | box AP | AP50 | AP75 |"
    yield "|---|---|---|---|---|---|"
    for name in SETS:
        for labels in LABELS:
            for arm in find_arms(out, name, f"detection_*_{labels}_seed*"):
                cells = " | ".join(str(collect(out, name, arm, labels, key)) for key in ("AP", "AP50", "AP75"))
                yield f"| {name} | {labels} | {arm} | {cells} |"


def draw(out: Path, path: Path) -> None:
    """Box AP over the number of labelled scenes, a panel for each set: every seed, mean and standard deviation."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SETS), sharey=True)
    everywhere = in_order(arm for name in SETS for arm in find_arms(out, name, "detection_*_seed*"))
    colours = dict(zip(everywhere, COLOURS, strict=False))
    highest = 1.0
    for panel, name in zip(panels, SETS, strict=True):
        arms = find_arms(out, name, "detection_*_seed*")
        for number, arm in enumerate(arms):
            cells = {labels: collect(out, name, arm, labels, "AP").values for labels in sorted(LABELS)}
            found = {labels: values for labels, values in cells.items() if values}
            places = [labels * 1.08 ** (number - (len(arms) - 1) / 2) for labels in found]
            highest = max([highest, *(value for values in found.values() for value in values)])
            means = [statistics.mean(values) for values in found.values()]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
            style: dict[str, Any] = {"color": colours[arm], "marker": "o", "markersize": 4, "capsize": 4}
            panel.errorbar(places, means, spread, label=TITLES.get(arm, arm), **style)
            for place, values in zip(places, found.values(), strict=True):
                panel.plot([1.04 * place] * len(values), values, ".", color=colours[arm], markersize=4, alpha=0.7)
        panel.set_xscale("log")
        panel.set_xticks([*LABELS], [str(labels) for labels in LABELS])
        panel.minorticks_off()
        panel.set_xlim(min(LABELS) / 1.5, max(LABELS) * 1.5)
        panel.set_title(TITLES.get(name, name), fontsize=10)
        panel.set_xlabel("labelled scenes")
        panel.grid(alpha=0.3)
        if arms:
            panel.legend(frameon=False, loc="upper left", fontsize=8)
    panels[0].set_ylabel("box AP on 500 held-out scenes (%)")
    figure.supxlabel("points: means; whiskers: standard deviation; small dots beside them: single seeds", fontsize=8)
    panels[0].set_ylim(0, 1.3 * highest)
    figure.savefig(path, dpi=150)


def finished(out: Path, name: str, pattern: str) -> list[Path]:
    """The results of a set's finished runs, by seed."""
    return sorted((out / name).glob(f"{pattern}/{FINISHED}"), key=lambda path: int(path.parent.name.split("_seed")[1]))


def find_arms(out: Path, name: str, pattern: str) -> list[str]:
    """The encoders of a set's finished runs."""
    return in_order(path.parent.name.split("_")[1] for path in finished(out, name, pattern))


def in_order(arms: Iterable[str]) -> list[str]:
    """Random weights, then ours, then the others."""
    return sorted({*arms}, key=lambda arm: (arm != RANDOM, arm != OURS, arm))


def collect(out: Path, name: str, arm: str, labels: int, key: str) -> Cell:
    """A figure of all finished seeds, in their order."""
    found = [json.loads(path.read_text()) for path in finished(out, name, f"detection_{arm}_{labels}_seed*")]
    return Cell([one["results"]["bbox"][key] for one in found])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `run` ends its process
    start(main)

"""Fine-tune a detector on converted weights: `python detection/train_net.py --config coco_R50_C4`."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foundation.command_line import add_keys_option
from foundation.errors import ArgumentParser, UserError, resumable, run
from foundation.locks import hold
from foundation.signals import StopRequest


class Numbers(argparse.Action):
    """Takes the numbers that follow an option, and leaves what follows them to KEY VALUE, which argparse does not."""

    def __init__(self, option_strings: list[str], dest: str, kind: Callable[[str], float], **rest: Any) -> None:
        super().__init__(option_strings, dest, "+", default=(), **rest)
        self.kind = kind

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Called by argparse."""
        numbers: list[float] = []
        for text in values:
            try:
                numbers.append(self.kind(text))
            except ValueError:
                break
        wrong = [text for text, number in zip(values, numbers, strict=False) if not 0 <= number < math.inf]
        if wrong or not numbers:
            text = (wrong or values)[0]
            parser.error(f"{self.option_strings[0]} needs finite numbers that are not negative, not {text!r}")
        setattr(namespace, self.dest, numbers)
        namespace.rest = [*getattr(namespace, "rest", ()), *values[len(numbers) :]]


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="train_net.py", description=__doc__)
    add = parser.add_argument
    add("--config", metavar="NAME|PATH", help="a recipe; not needed with --train-json, or to --resume a run")
    add("--output", metavar="DIR", help="folder of the run (OUTPUT_DIR)")
    add("--weights", metavar="FILE|RUN", help="weights to start from, of any project, or a run (MODEL.WEIGHTS)")
    add("--resume", action="store_true", help="continue from the last intact checkpoint in DIR")
    add("--eval-only", action="store_true", help="evaluate a whole detector, do not train")
    only = parser.add_argument_group("print or draw, and stop (one of them)").add_mutually_exclusive_group()
    only.add_argument("--check-data", action="store_true", help="what is wrong with the datasets")
    only.add_argument("--dry-run", action="store_true", help="epochs, learning rates, memory and hours")
    only.add_argument("--show-data", type=int, metavar="N", help="N training images as the model gets them")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--num-gpus", type=int, metavar="N", help="GPUs of this machine; 0 is the CPU")
    machines.add_argument("--num-machines", type=int, default=1, metavar="N")
    machines.add_argument("--machine-rank", type=int, default=0, metavar="RANK", help="0 is the first machine")
    machines.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0")
    rates = parser.add_argument_group("learning rate and repetitions")
    rates.add_argument(
        "--lr-preset",
        choices=["moco", "lars"],  # the keys of detection.training.scaling.PRESETS
        help="moco: the recipe's; lars: 5 times that on VOC, 1.5 times on other data",
    )
    rates.add_argument(
        "--sweep-lr", action=Numbers, kind=float, metavar="LR", help="a run for each, in DIR/lrLR, and a table"
    )
    rates.add_argument(
        "--seeds", action=Numbers, kind=int, metavar="SEED", help="a run for each, in DIR/seedSEED; mean and spread"
    )
    own = parser.add_argument_group("data of your own, in COCO's format")
    own.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    own.add_argument("--train-images", metavar="DIR", help="the folder of their images, where it is not beside FILE")
    own.add_argument("--test-json", metavar="FILE", help="annotations to evaluate on")
    own.add_argument("--test-images", metavar="DIR", help="the folder of their images, where it is not beside FILE")
    own.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="without --test-json, this fraction of the training images is set aside to evaluate on; default 0.2",
    )
    add_keys_option(parser, "detection.config:default_config")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="config keys, such as SEED 3; KEY=VALUE works too"
    )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with all KEY VALUE in `overrides`."""
    arguments = build_parser().parse_args(argv)
    arguments.overrides = [*getattr(arguments, "rest", ()), *arguments.overrides]
    own = Path(arguments.output or "", "config.yaml")
    if arguments.config is None and not arguments.train_json:
        if arguments.output and (arguments.resume or arguments.eval_only) and own.is_file():
            arguments.config = str(own)
            return arguments
        if arguments.output and (arguments.resume or arguments.eval_only):
            raise UserError(
                f"{arguments.output} holds no run (config.yaml) to continue or evaluate: correct --output, or name a"
                " recipe with --config"
            )
        raise UserError("name a recipe with --config, or data of your own with --train-json FILE")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Train once or several times, or do what the options ask for instead, in as many processes as there are GPUs."""
    arguments = parse(argv)
    if arguments.check_data or arguments.dry_run or arguments.show_data is not None:
        look(arguments)
    elif arguments.eval_only:
        evaluate(arguments)
    else:
        with resumable(), StopRequest() as request:  # from here on, because annotations can take a minute to read
            train(arguments, request)


def look(arguments: argparse.Namespace) -> None:
    """Print or draw what the options ask for, without a run."""
    from detection.training import prepare

    config = prepare.configure(arguments)
    if arguments.check_data:
        from detection.checks import audit

        raise SystemExit(audit.run(config))
    processes = arguments.num_machines * max(arguments.num_gpus, 1)
    if arguments.dry_run:
        from detection.training import dry_run

        for line in dry_run.describe(config, processes):
            print(line, flush=True)
        return
    from detection.training import show_data

    print(f"the training images are drawn in {show_data.write(config, arguments.show_data, processes)}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a whole detector."""
    from detection.training import launch, prepare, trainer
    from foundation.config import recipe_name

    config = prepare.configure(arguments)
    own = prepare.check_evaluation(config, prepare.names_weights(arguments))
    if arguments.machine_rank == 0:
        hold(Path(config.OUTPUT_DIR))
    launch.run(arguments, trainer.evaluate, config, recipe_name(arguments.config), own)


def train(arguments: argparse.Namespace, request: StopRequest) -> None:
    """Check, then train, once or for each learning rate and seed."""
    with request.importing():
        from detection.training import launch, prepare, series, trainer
        from foundation.config import recipe_name

    config = prepare.configure(arguments)
    name = recipe_name(arguments.config)

    def train_one(config: Any, resume: bool = True) -> None:
        request.begin()
        prepare.check(config, resume)
        # One of several machines could see another folder than the rest, who would wait for it.
        if resume and arguments.num_machines == 1 and prepare.nothing_left(config):
            request.finish()
            print(f"{config.OUTPUT_DIR} is finished: its results are in results.json")
            return
        if arguments.machine_rank == 0:
            hold(Path(config.OUTPUT_DIR))
        launch.run(arguments, trainer.train, config, name, resume, request=request)

    if arguments.seeds or arguments.sweep_lr:
        members = series.plan(config, arguments.sweep_lr, arguments.seeds)
        series.run(Path(config.OUTPUT_DIR), members, train_one)
    else:
        train_one(config, arguments.resume)


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

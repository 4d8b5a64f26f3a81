"""Fine-tune a detector on converted weights: `python detection/train_net.py --config coco_R50_C4`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cli.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:
    import argparse

    from fvcore.common.config import CfgNode


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="train_net.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a recipe of configs/detection")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="GPUs of this machine; 0 is the CPU")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="RANK", help="0 is the first machine")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0")
    parser.add_argument("--eval-only", action="store_true", help="evaluate a whole detector, do not train")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in DIR")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (OUTPUT_DIR)")
    parser.add_argument("--weights", metavar="FILE", help="weights to start from (MODEL.WEIGHTS)")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys, for instance SEED 3")
    return parser


def configure(arguments: "argparse.Namespace") -> "CfgNode":
    """The config that the run uses, with the machine's device and the command's folder and weights in it.

    Raises:
        UserError: a wrong key or value, or more GPUs than there are.
    """
    import torch

    from detection import config as configs

    config = configs.load(arguments.config, arguments.overrides)
    if arguments.output:
        config.OUTPUT_DIR = arguments.output
    elif config.OUTPUT_DIR == configs.default_config().OUTPUT_DIR:
        config.OUTPUT_DIR = str(Path(config.OUTPUT_DIR) / Path(arguments.config).stem)
    if arguments.weights is not None:
        config.MODEL.WEIGHTS = arguments.weights
    there = torch.cuda.device_count()
    gpus = arguments.num_gpus
    if gpus is None:
        gpus = min(there, 1) if config.MODEL.DEVICE == "cuda" else 0
    if not 0 <= gpus <= there:
        raise UserError(f"--num-gpus {gpus}: this machine has {there} GPUs that PyTorch can use")
    if arguments.num_machines > 1 and not gpus:
        raise UserError(f"--num-machines {arguments.num_machines}: several machines need GPUs, and this has none")
    if arguments.num_machines > 1 and arguments.dist_url == "auto":
        raise UserError("several machines need --dist-url tcp://HOST:PORT of the first one")
    processes = arguments.num_machines * max(gpus, 1)
    if config.SOLVER.IMS_PER_BATCH % processes:
        batch = f"SOLVER.IMS_PER_BATCH {config.SOLVER.IMS_PER_BATCH}"
        raise UserError(f"{batch} is not a multiple of the number of processes, {processes}")
    arguments.num_gpus = gpus
    config.MODEL.DEVICE = "cuda" if gpus else "cpu"
    if config.SOLVER.AMP.ENABLED and not gpus:
        raise UserError("SOLVER.AMP.ENABLED needs a GPU; leave it off on the CPU")
    return config


def check(config: "CfgNode", resume: bool, eval_only: bool) -> None:
    """Everything that can be known to fail before the first step.

    Raises:
        UserError: a dataset is not all there, weights do not fit, or the folder holds another run.
    """
    from detection import datasets, trainer

    names = config.DATASETS.TEST if eval_only else (*config.DATASETS.TRAIN, *config.DATASETS.TEST)
    datasets.register(names)
    for name in names:
        datasets.check(name, config.MODEL.ROI_HEADS.NUM_CLASSES)
    begun = (Path(config.OUTPUT_DIR) / "last_checkpoint").exists()
    if config.MODEL.WEIGHTS and not (begun and resume):
        trainer.check_weights(config, whole=eval_only)
    if begun and not resume and not eval_only:
        raise UserError(
            f"{config.OUTPUT_DIR} already holds a run: continue it with --resume, or choose another --output"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Configure, check, then train or evaluate, in as many processes as there are GPUs."""
    arguments = build_parser().parse_intermixed_args(argv)
    config = configure(arguments)
    check(config, arguments.resume, arguments.eval_only)

    from detection import trainer
    from detection.config import for_one_process

    # isort: split
    from detectron2.engine import launch

    if max(arguments.num_gpus, 1) * arguments.num_machines == 1:
        config, changed = for_one_process(config)
        if changed:
            batch = config.SOLVER.IMS_PER_BATCH
            print(f"warning: one process: BN over its {batch} images instead of SyncBN in {', '.join(changed)}")
    name = Path(arguments.config).stem
    work, rest = (trainer.evaluate, ()) if arguments.eval_only else (trainer.train, (arguments.resume,))
    launch(
        work,
        arguments.num_gpus,
        arguments.num_machines,
        arguments.machine_rank,
        arguments.dist_url,
        args=(config, name, *rest),
    )


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

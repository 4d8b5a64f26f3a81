"""From a command line to a config that can run on this machine, and the checks before the first step."""

import argparse
import atexit
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from fvcore.common.config import CfgNode

from detection import config as configs
from detection.checks import preflight
from detection.data import custom, datasets, requirements
from detection.evaluation import evaluators
from detection.training import checkpoints, model, plan, run_folder, scaling, weights
from foundation import devices
from foundation.config import RUN_CONFIG, config_folder, find_config, keys, override_pairs, value_of
from foundation.errors import UserError
from foundation.files import check_utf8, check_writable
from foundation.locks import is_held
from foundation.run_kinds import DETECTION, read_results, refuse_other_kind
from foundation.wandb_mirror import require_wandb

DEFAULT_RECIPES = {"cuda": "coco_R50_FPN_1x_moco", "cpu": "shapes_R18_FPN"}  # for data of one's own
VAL_FRACTION = 0.2  # of the images of one file, to evaluate on
SPLIT = "data"  # folder in the run's, with the two parts of a dataset
OF_SEEDS, OF_SWEEP = ("seed*/",), ("lr*/", "lr*/seed*/")  # folders of the runs of a series, in that of the series
MEAN_SIGMA = 0.067  # the mean of the tolerances of COCO's keypoints


def configure(arguments: argparse.Namespace) -> CfgNode:
    """The config that the run uses: the recipe with the command's choices, scaled to its number of processes.

    Raises:
        UserError: a wrong key or value, choices that exclude each other, a folder that cannot be written, or more GPUs
            than there are.
    """
    _check_choices(arguments)
    if arguments.config is None:
        arguments.config = DEFAULT_RECIPES["cuda" if _gpus(arguments, "cuda") else "cpu"]
    config = configs.load(arguments.config, arguments.overrides)
    if arguments.output:
        config.OUTPUT_DIR = arguments.output
    elif holds_run := _folder_of_run(arguments):
        config.OUTPUT_DIR = holds_run
    elif config.OUTPUT_DIR == configs.default_config().OUTPUT_DIR:
        config.OUTPUT_DIR = default_output(arguments.config)
    if not (arguments.check_data or arguments.dry_run):  # which write nothing
        check_writable(Path(config.OUTPUT_DIR))  # before annotations are read and the plan is worked out
    own = _own_datasets(arguments, Path(config.OUTPUT_DIR))
    overridden = dict(override_pairs(arguments.overrides))
    for part, name in own.items():
        if f"DATASETS.{part}" not in overridden:
            config.DATASETS[part] = (name,)
    if arguments.weights is not None:
        config.MODEL.WEIGHTS = arguments.weights
    arguments.num_gpus = _gpus(arguments, config.MODEL.DEVICE)
    config.MODEL.DEVICE = "cuda" if arguments.num_gpus else "cpu"
    if own:
        _fit_to_data(config, trains="TRAIN" in own)
    given = _given_keys(config, arguments)
    begun = _begun_config(config, arguments)
    planned = "TRAIN" in own and _is_recipe(arguments.config)
    if begun is None and config.MODEL.WEIGHTS and not arguments.eval_only:
        if names_weights(arguments) and not Path(config.MODEL.WEIGHTS).exists():
            raise UserError(f"{config.MODEL.WEIGHTS}: there is no such file of weights")
        for line in weights.adopt(config, weights.describe(Path(config.MODEL.WEIGHTS)), given):
            print(f"note: {line}")
        configs.complete(config)
    if begun is None and planned:
        if _begins_run(arguments):
            refuse_begun(Path(config.OUTPUT_DIR))  # before the plan is worked out and printed
        try:
            _apply_plan(config, given, _planned_for(config, arguments))
        except UserError:
            if not arguments.check_data:  # which lists this mistake and all others
                raise
    if arguments.lr_preset:
        config = scaling.apply_preset(config, arguments.lr_preset)
    processes = arguments.num_machines * max(arguments.num_gpus, 1)
    config = scaling.scale(config, processes)
    if processes == 1:
        config, changed = configs.for_one_process(config)
        if changed:
            batch = config.SOLVER.IMS_PER_BATCH // config.SOLVER.ACCUMULATION
            print(f"warning: one process: BN over {batch} images at a time instead of SyncBN in {', '.join(changed)}")
    if begun is not None:  # what was worked out when the run began, it keeps
        for key in (*weights.ADOPTED, *(plan.KEYS if planned else ())):
            if key not in given:
                config.merge_from_list([key, value_of(begun, key)])
    for line in configs.without_effect(config, list(overridden)) if not arguments.eval_only else ():
        print(f"warning: {line}")
    return config


def check(config: CfgNode, resume: bool) -> None:
    """Check everything that can be known to fail before the first step.

    Raises:
        UserError: as `check_ahead`; or the folder holds another run, or results without their run.
    """
    folder = Path(config.OUTPUT_DIR)
    check_utf8(folder)
    begun = checkpoints.exists(folder)
    if begun and resume:
        run_folder.check_same(folder, config)
    else:
        refuse_begun(folder)
    check_ahead(config, begun)


def refuse_begun(folder: Path) -> None:
    """Raises UserError where a new run would replace a run, or results without their run."""
    if checkpoints.exists(folder):
        raise UserError(f"{folder} already holds a run: continue it with --resume, or choose another --output")
    refuse_other_kind(folder, DETECTION)
    if read_results(folder):
        raise UserError(
            f"{folder} holds results of a detector, and no checkpoint of it: choose another --output, or remove"
            " results.json"
        )


def check_ahead(config: CfgNode, begun: bool) -> None:
    """Check what does not depend on the folder of the run.

    Args:
        config: of the run.
        begun: it is continued, and needs no initial weights.

    Raises:
        UserError: a dataset is not all there, weights do not fit, or keys of the config do not go together.
    """
    if config.SOLVER.MAX_ITER in config.SOLVER.STEPS:
        raise UserError(
            f"SOLVER.STEPS has {config.SOLVER.MAX_ITER}, where the training ends (SOLVER.MAX_ITER): leave that step out"
        )
    if config.LOG.WANDB:
        require_wandb()
    if config.TEST.PATIENCE and not config.TEST.EVAL_PERIOD and not begun:
        raise UserError(
            f"TEST.PATIENCE {config.TEST.PATIENCE} has no effect without evaluations during the training: set"
            " TEST.EVAL_PERIOD, or leave it out"
        )
    preflight.check(config, config.DATASETS.TRAIN, config.DATASETS.TEST)
    if not begun:
        evaluators.check_metric(config)
        model.check(config, whole=False)


def names_weights(arguments: argparse.Namespace) -> bool:
    """Whether the command line names weights, instead of only the config."""
    return arguments.weights is not None or "MODEL.WEIGHTS" in dict(override_pairs(arguments.overrides))


def check_evaluation(config: CfgNode, weights_given: bool) -> bool:
    """Check everything that can be known to fail before an evaluation.

    Args:
        config: of the run.
        weights_given: `MODEL.WEIGHTS` are of the command line, and not the initial weights that a config names.

    Returns:
        Whether the run in the folder is to be evaluated, instead of `MODEL.WEIGHTS`.

    Raises:
        UserError: a dataset is not all there, weights do not fit, or the folder holds another run, or one that has no
            checkpoint yet.
    """
    folder = Path(config.OUTPUT_DIR)
    own = checkpoints.exists(folder)
    if own and weights_given:
        raise UserError(f"{folder} already holds a run: leave --weights out to evaluate it, or choose another --output")
    if not own and not config.MODEL.WEIGHTS:
        raise UserError(f"{folder} holds no checkpoint to evaluate; name a detector with --weights FILE")
    if not own:
        refuse_other_kind(folder, DETECTION)
        of_results = read_results(folder).get("weights")
        if of_results not in (None, config.MODEL.WEIGHTS):
            raise UserError(f"{folder} holds the results of {of_results or 'a detector'}: choose another --output")
        if (folder / run_folder.RECORDS).is_file():  # an evaluation writes none; its config would replace the run's
            raise UserError(f"{folder} holds a run without a checkpoint: choose another --output for the evaluation")
    preflight.check(config, (), config.DATASETS.TEST)
    if not own:
        model.check(config, whole=True)
    return own


def nothing_left(config: CfgNode) -> bool:
    """Whether the folder holds the trained detector, intact, and its results by this very config.

    Raises:
        UserError: every checkpoint is damaged.
    """
    folder = Path(config.OUTPUT_DIR)
    return run_folder.is_finished(config) and checkpoints.newest_intact(folder) == folder / checkpoints.FINAL


def _check_choices(arguments: argparse.Namespace) -> None:
    by_key = "SOLVER.BASE_LR" in dict(override_pairs(arguments.overrides))
    if by_key + bool(arguments.lr_preset) + bool(arguments.sweep_lr) > 1:
        raise UserError("SOLVER.BASE_LR, --lr-preset and --sweep-lr all set the learning rate: give one of them")
    if arguments.seeds and "SEED" in dict(override_pairs(arguments.overrides)):
        raise UserError("SEED and --seeds both set the seed: give one of them")
    if arguments.seeds or arguments.sweep_lr:
        if arguments.eval_only:
            raise UserError("--seeds and --sweep-lr train: they do not go with --eval-only")
        if arguments.num_machines > 1:
            raise UserError("--seeds and --sweep-lr work on one machine: start the runs one by one, each with its SEED")
    for part in ("train", "test"):
        if getattr(arguments, f"{part}_images") and not getattr(arguments, f"{part}_json"):
            raise UserError(f"--{part}-images is the folder of --{part}-json FILE, which is not named")
    if arguments.val_fraction is not None and (arguments.test_json or not arguments.train_json):
        raise UserError("--val-fraction divides --train-json FILE where there is no --test-json: leave it out")
    machines, rank = arguments.num_machines, arguments.machine_rank
    if machines < 1:
        raise UserError(f"--num-machines {machines} must be 1 or more")
    if not 0 <= rank < machines:
        there = "there is 1 machine" if machines == 1 else f"there are {machines} machines"
        raise UserError(f"--machine-rank {rank} must be 0 to {machines - 1}: {there} (--num-machines)")


def _folder_of_run(arguments: argparse.Namespace) -> str:
    """The folder of the run that is continued or evaluated by its own config; empty where that is none.

    Of a run that was moved or copied, the config names the folder that it was begun in.
    """
    if not (arguments.resume or arguments.eval_only) or "OUTPUT_DIR" in dict(override_pairs(arguments.overrides)):
        return ""
    path = find_config(arguments.config, "detection")
    return str(path.parent) if path.name == RUN_CONFIG and checkpoints.exists(path.parent) else ""


def default_output(recipe: str) -> str:
    """The folder of a run where none is named."""
    return str(Path(configs.default_config().OUTPUT_DIR) / Path(recipe).stem)


def _own_datasets(arguments: argparse.Namespace, output: Path) -> dict[str, str]:
    """Names of the user's own datasets, by the part that they take, TRAIN and TEST; empty where there are none.

    Without a file to evaluate on, a part of the training images is set aside for it.

    Args:
        arguments: of the command.
        output: folder of the run.
    """
    train, test = arguments.train_json, arguments.test_json
    if not train and not test:
        return {}
    if not train and not arguments.eval_only:
        raise UserError("data of your own to train on needs --train-json FILE; --test-json alone goes with --eval-only")
    folders: dict[str, Path] = {}
    for part, file, images in (("train", train, arguments.train_images), ("test", test, arguments.test_images)):
        is_needed = not arguments.check_data and not (part == "train" and arguments.eval_only)
        if images and is_needed and not Path(images).is_dir():
            raise UserError(f"--{part}-images {images}: there is no such folder")
        if file and (images or file not in folders):  # one file for both may have its folder named once
            folders[file] = Path(images) if images else custom.find_images(Path(file))
    if test:
        parts = {"TRAIN": train, "TEST": test} if train else {"TEST": test}
        return {part: datasets.custom_name(Path(file), folders[file]) for part, file in parts.items()}
    fraction = _val_fraction(arguments)
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction must be between 0 and 1, not {fraction}")
    if arguments.check_data:  # of the whole file, which a run divides afterwards
        name = datasets.custom_name(Path(train), folders[train])
        return {"TRAIN": name, "TEST": name}
    return _divided_datasets(folders[train], arguments, output)


def _divided_datasets(images: Path, arguments: argparse.Namespace, output: Path) -> dict[str, str]:
    """Names of the two parts of the file --train-json, TRAIN and TEST; the images are in a folder.

    Raises:
        UserError: as `_divide`.
    """
    train, fraction = arguments.train_json, _val_fraction(arguments)
    folder = _divide(Path(train), images, fraction, arguments, output)
    print(f"note: {fraction:.0%} of the images, drawn at random, are for evaluation (--val-fraction)")
    names = [datasets.custom_name(file, images.resolve()) for file in custom.part_files(folder)]
    for name, use in zip(names, ("train", "evaluate"), strict=True):
        datasets.ORIGINS[name] = f"{train} (the part to {use} on)"
    return dict(zip(("TRAIN", "TEST"), names, strict=True))


def _val_fraction(arguments: argparse.Namespace) -> float:
    return VAL_FRACTION if arguments.val_fraction is None else float(arguments.val_fraction)


def _planned_for(config: CfgNode, arguments: argparse.Namespace) -> str:
    """The dataset that a run would train on. --check-data looks through a whole file, of which a run uses a part."""
    (name,) = config.DATASETS.TRAIN
    _, custom_file, images = name.partition(datasets.CUSTOM)
    if arguments.check_data and not arguments.test_json and custom_file:
        return _divided_datasets(Path(images), arguments, Path(config.OUTPUT_DIR))["TRAIN"]
    return str(name)


def _divide(train: Path, images: Path, fraction: float, arguments: argparse.Namespace, output: Path) -> Path:
    """The folder with the two parts of a dataset. Those of a run that has begun are never replaced.

    Raises:
        UserError: the run in the folder has other parts, or they cannot be made.
    """
    parts = custom.divide(train, images, fraction)
    for line in custom.describe_absent(parts):
        print(f"warning: {line}")
    if arguments.check_data or arguments.dry_run or arguments.show_data is not None:  # these leave no trace
        folder = Path(tempfile.mkdtemp(prefix="split-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        custom.write_parts(parts, folder)
        return folder
    folder, begun = output / SPLIT, _begun_run(output, (*OF_SEEDS, *OF_SWEEP))
    if begun:  # by an earlier version perhaps, which wrote the parts elsewhere
        name = configs.load(str(begun / RUN_CONFIG)).DATASETS.TRAIN[0]
        used = Path(f"{name.partition(datasets.CUSTOM)[0]}.json")
        if used.parent.name == SPLIT and used.name == custom.part_files(folder)[0].name and _has_parts(used.parent):
            folder = used.parent
    if not ((begun or is_held(output)) and _has_parts(folder)):
        custom.write_parts(parts, output / SPLIT)
    elif not any(
        custom.are_written(each, folder) for each in (parts, custom.divide(train, images, fraction, by_file=False))
    ):
        raise UserError(
            f"{output} holds a run on other images than {train} with --val-fraction {fraction:g} gives:"
            " choose another --output, or give the file and the fraction that the run began with"
        )
    return folder


def _has_parts(folder: Path) -> bool:
    return all(file.is_file() for file in custom.part_files(folder))


def _given_keys(config: CfgNode, arguments: argparse.Namespace) -> Collection[str]:
    """The keys that the user has set: those of the command line, and of a config of the user's own all."""
    if not _is_recipe(arguments.config):
        return set(keys(config))
    return {key for key, _ in override_pairs(arguments.overrides)}


def _is_recipe(name: str) -> bool:
    """Whether a config is one of the project's, and not the user's own or a run's."""
    return find_config(name, "detection").parent == config_folder("detection")


def _begins_run(arguments: argparse.Namespace) -> bool:
    """Whether the command is to begin one run. A series continues its runs, and the other commands train nothing."""
    others = (arguments.dry_run, arguments.check_data, arguments.show_data is not None, arguments.eval_only)
    return not any((*others, arguments.resume, arguments.seeds, arguments.sweep_lr))


def _begun_config(config: CfgNode, arguments: argparse.Namespace) -> CfgNode | None:
    """The config of the run in the folder, where it is continued or evaluated; of a series, that of one of its runs."""
    if not (arguments.resume or arguments.eval_only or arguments.seeds or arguments.sweep_lr):
        return None
    # A run of a sweep has a learning rate of its own, which is not that of runs with other seeds only.
    members = OF_SWEEP if arguments.sweep_lr else OF_SEEDS if arguments.seeds else ()
    begun = _begun_run(Path(config.OUTPUT_DIR), members)
    return configs.load(str(begun / RUN_CONFIG)) if begun else None


def _begun_run(folder: Path, series: Sequence[str]) -> Path | None:
    """The folder of the run that was begun in a folder or, of a series, in one that these patterns match."""
    members = [each for pattern in series for each in folder.glob(pattern)]
    found = (each for each in [folder, *sorted(members)] if checkpoints.exists(each))
    return next((each for each in found if (each / RUN_CONFIG).is_file()), None)


def _apply_plan(config: CfgNode, given: Collection[str], name: str) -> None:
    """Work out a schedule, sizes and anchors for the user's own training images, those of `name`, and print them."""
    datasets.register([name])
    # With an exponent, the schedule of all images is shortened afterwards.
    fraction = 1.0 if config.SOLVER.FRACTION_EXPONENT else config.DATASETS.FRACTION
    records = DatasetCatalog.get(name)
    if not records:
        raise UserError(f"{name.partition(datasets.CUSTOM)[0]}.json has no images to train on")
    if config.DATALOADER.FILTER_EMPTY_ANNOTATIONS:  # without any that is left, the check before the run stops it
        records = filter_images_with_only_crowd_annotations(records) or records
    images = plan.survey(records, fraction)
    print("plan for your own data (KEY VALUE on the command line takes precedence):")
    for line in plan.apply(config, images, config.MODEL.DEVICE, given):
        print(f"  {line}")


def _fit_to_data(config: CfgNode, trains: bool) -> None:
    """Set the number of classes, and of keypoints if the model has them, to those of the user's own data.

    The training set decides, also where a run of it is evaluated on other data, which may have fewer classes: a run has
    noted their names. Where it is not known, because a recipe is given for the evaluation, or the file is gone that an
    earlier version trained on, the test set takes its place.
    """
    if config.DATASETS.CLASSES and not trains:
        return
    name = config.DATASETS.TRAIN[0]
    if not trains and not (datasets.CUSTOM in name and Path(f"{name.partition(datasets.CUSTOM)[0]}.json").is_file()):
        config.DATASETS.TRAIN = config.DATASETS.TEST
        name = config.DATASETS.TEST[0]
    datasets.register([name])
    names = datasets.known_classes(name)
    requirements.set_classes(config, len(names))
    if trains:
        config.DATASETS.CLASSES = tuple(names)
    keypoints = datasets.known_keypoints(name) if config.MODEL.KEYPOINT_ON else []
    if keypoints:
        points = config.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoints)
        given = len(config.TEST.KEYPOINT_OKS_SIGMAS)
        if given != points and (given or not datasets.are_of_persons(keypoints)):
            config.TEST.KEYPOINT_OKS_SIGMAS = [MEAN_SIGMA] * points
            print(f"note: TEST.KEYPOINT_OKS_SIGMAS is {MEAN_SIGMA}, the mean of COCO's, for each of {points} keypoints")


def _gpus(arguments: argparse.Namespace, device: str) -> int:
    """GPUs to use on this machine; 0 is the CPU."""
    if device not in ("cuda", "cpu"):
        raise UserError(f"MODEL.DEVICE must be cuda or cpu, not {device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs")
    there = torch.cuda.device_count()
    if device == "cuda" and not there:
        devices.is_usable()  # warns where it should be
    gpus = arguments.num_gpus
    if gpus is None:
        gpus = min(there, 1) if device == "cuda" else 0
    if not 0 <= gpus <= there:
        raise UserError(f"--num-gpus {gpus}: this machine has {there} GPUs that PyTorch can use; give at most that")
    if arguments.num_machines > 1 and not gpus:
        raise UserError(f"--num-machines {arguments.num_machines}: several machines need GPUs, and this has none")
    if arguments.num_machines > 1 and arguments.dist_url == "auto":
        raise UserError("several machines need --dist-url tcp://HOST:PORT of the first one")
    return int(gpus)

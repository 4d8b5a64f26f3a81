"""Compare the C4 detector of this project with that of MoCo's own repository, to the last bit.

    git clone https://github.com/facebookresearch/moco
    python benchmarks/moco_parity.py moco

Each side runs in a process of its own: MoCo's with its `detection/train_net.py` (trainer, head) and its config file,
ours with the recipe `coco_R50_C4`. Both begin with the same converted encoder and the same seed, map the same images of
synthetic data in COCO's format, and train on them, each with its own model, optimizer and schedule. Compared are the
mapped images with their boxes and masks, and of each iteration losses, norms of the gradients, and learning rates; then
all parameters and buffers, before the first iteration and after the last.

Images and the number of sampled regions are small, on both sides, so that a CPU takes a minute. Exit status 1:
something differs.
"""

import argparse
import copy
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coco_like import HEIGHT, WIDTH, synthetic_results
from PIL import Image

from convert import to_d2
from detection import config as configs
from detection.data import training_data
from detection.training import weights
from foundation.errors import ArgumentParser, UserError, run

RECIPE, THEIRS = "coco_R50_C4", "coco_R_50_C4_2x_moco.yaml"
DATASET = "parity_train"
IMAGES_PER_BATCH = 2
SIDES = ("ours", "moco")


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides, compare and print. Leaves with status 1 if something differs.

    Raises:
        UserError: the folder is not a clone of MoCo's repository, or there are no iterations.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moco", type=Path, metavar="PATH_TO_MOCO", help="a clone of facebookresearch/moco")
    parser.add_argument("--iterations", type=int, default=4, metavar="N", help="of training (%(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for part in ("train_net.py", f"configs/{THEIRS}"):
        if not (arguments.moco / "detection" / part).is_file():
            raise UserError(f"{arguments.moco} is no clone of facebookresearch/moco: it has no detection/{part}")
    if arguments.iterations < 1:
        raise UserError(f"--iterations is {arguments.iterations}; it must be 1 or greater")
    if arguments.side:
        torch.save(run_side(arguments), arguments.folder / f"{arguments.side}.pt")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), IMAGES_PER_BATCH * arguments.iterations)
        write_weights(Path(folder))
        for side in SIDES:
            command = [sys.executable, "-W", "ignore", __file__, str(arguments.moco)]
            command += ["--iterations", str(arguments.iterations), "--side", side, "--folder", folder]
            if status := subprocess.run(command, check=False).returncode:
                raise SystemExit(status if status > 0 else 1)  # it has said why
        ours, theirs = (torch.load(Path(folder, f"{side}.pt"), weights_only=True) for side in SIDES)
    if report(ours, theirs):
        raise SystemExit(1)


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one side computes: `inputs`, `before`, `losses`, `gradients`, `rates`, `after`."""
    from detectron2.data import get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances
    from detectron2.utils.events import EventStorage

    logging.disable(logging.WARNING)  # of what the weights do not fill
    folder = arguments.folder
    register_coco_instances(DATASET, {}, str(folder / "instances.json"), str(folder / "images"))
    build = our_side if arguments.side == "ours" else their_side
    model, optimizer, scheduler, mapper = build(arguments)
    records = get_detection_dataset_dicts([DATASET])
    found: dict[str, Any] = {"inputs": [], "losses": [], "gradients": [], "rates": [], "before": state_of(model)}
    model.train()
    for number in range(arguments.iterations):
        batch = []
        for place in range(number * IMAGES_PER_BATCH, (number + 1) * IMAGES_PER_BATCH):
            seed(place)  # of the augmentations
            batch.append(mapper(copy.deepcopy(records[place])))
        seed(number)  # of the sampled regions
        with EventStorage(number):
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        found["inputs"].append([tensors_of(each) for each in batch])
        found["losses"].append({name: loss.detach() for name, loss in losses.items()})
        found["gradients"].append({name: each.grad.norm() for name, each in model.named_parameters()})
        found["rates"].append([group["lr"] for group in optimizer.param_groups])
    return found | {"after": state_of(model)}


def our_side(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """The model with the weights, the optimizer, the schedule and the mapper of the recipe."""
    from detection.training.trainer import TransferTrainer

    config, _ = configs.for_one_process(configs.load(RECIPE, [str(each) for each in small(arguments.folder)]))
    seed(0)
    model = TransferTrainer.build_model(config)
    weights.load_backbone(model, arguments.folder / "encoder.pkl")
    optimizer = TransferTrainer.build_optimizer(config, model)
    scheduler = TransferTrainer.build_lr_scheduler(config, optimizer)
    return model, optimizer, scheduler, training_data.training_mapper(config)


def their_side(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """The same from MoCo's config file, by MoCo's trainer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

    tool = arguments.moco / "detection" / "train_net.py"
    specification = importlib.util.spec_from_file_location("moco_train_net", tool)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    ROI_HEADS_REGISTRY._obj_map.pop("Res5ROIHeadsExtraNorm", None)  # ours, of the same name: theirs is to be used
    specification.loader.exec_module(module)
    config = get_cfg()
    config.merge_from_file(str(arguments.moco / "detection" / "configs" / THEIRS))
    config.merge_from_list(small(arguments.folder))
    if config.MODEL.RESNETS.NORM == "SyncBN":  # of an earlier revision; PyTorch's refuses a CPU
        config.MODEL.RESNETS.NORM = "BN"
    seed(0)
    model = module.Trainer.build_model(config)
    assert type(model.roi_heads).__module__ == "moco_train_net"
    DetectionCheckpointer(model).load(str(arguments.folder / "encoder.pkl"))
    optimizer = module.Trainer.build_optimizer(config, model)
    scheduler = module.Trainer.build_lr_scheduler(config, optimizer)
    return model, optimizer, scheduler, DatasetMapper(config, is_train=True)


def small(folder: Path) -> list[Any]:
    """What is changed on both sides: the data, the device, and sizes that a CPU can take."""
    return [
        *("DATASETS.TRAIN", (DATASET,), "DATASETS.TEST", (DATASET,), "MODEL.DEVICE", "cpu"),
        *("MODEL.WEIGHTS", str(folder / "encoder.pkl"), "SOLVER.IMS_PER_BATCH", IMAGES_PER_BATCH),
        *("INPUT.MIN_SIZE_TRAIN", (128, 160), "INPUT.MAX_SIZE_TRAIN", 256),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
    ]


def seed(number: int) -> None:
    """Seed what augmentations, initial weights and sampled regions are drawn from."""
    np.random.seed(number)
    torch.manual_seed(number)


def write_data(folder: Path, count: int) -> None:
    """Images of noise, with objects of even colours, and their annotations in COCO's format."""
    dataset, _ = synthetic_results(count, detections=0)
    (folder / "instances.json").write_text(json.dumps(dataset))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for image in dataset["images"]:
        pixels = rng.integers(60, 190, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for entry in dataset["annotations"]:
            if entry["image_id"] == image["id"]:
                left, top, width, height = map(int, entry["bbox"])
                pixels[top : top + height, left : left + width] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])


def write_weights(folder: Path) -> None:
    """A ResNet-50 of random weights, converted."""
    from torchvision.models import resnet50

    seed(1)
    torch.save(resnet50().state_dict(), folder / "encoder.pt")
    to_d2.main([str(folder / "encoder.pt"), str(folder / "encoder.pkl")])


def state_of(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all parameters and buffers, by name."""
    return {
        kind: {name: value.detach().clone() for name, value in pairs}
        for kind, pairs in (("parameters", model.named_parameters()), ("buffers", model.named_buffers()))
    }


def tensors_of(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The image, boxes, classes and corners of the masks of a mapped record."""
    instances = record["instances"]
    corners = [torch.as_tensor(each).flatten() for polygons in instances.gt_masks.polygons for each in polygons]
    boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
    return {"image": record["image"], "boxes": boxes, "classes": classes, "masks": torch.cat(corners)}


def report(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Print the largest difference of each kind; 1 if any is not 0."""
    largest = {
        "mapped images, boxes, masks": difference(ours["inputs"], theirs["inputs"]),
        "parameters and buffers before": difference(ours["before"], theirs["before"]),
        "losses": difference(ours["losses"], theirs["losses"]),
        "norms of the gradients": difference(ours["gradients"], theirs["gradients"]),
        "learning rates": difference(ours["rates"], theirs["rates"]),
        "parameters and buffers after": difference(ours["after"], theirs["after"]),
    }
    counts = {kind: len(values) for kind, values in ours["after"].items()}
    total = ", ".join(f"{sum(losses.values()):.4f}" for losses in ours["losses"])
    print(f"{counts['parameters']} parameters, {counts['buffers']} buffers; losses of the iterations: {total}")
    for name, value in largest.items():
        print(f"largest difference of {name}: {value}")
    return int(any(value != 0 for value in largest.values()))


def difference(one: Any, other: Any) -> float:
    """The largest absolute difference of two equal structures of numbers; infinite where they differ or hold a NaN."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return float("inf")
        return max(difference(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return max(map(difference, one, other)) if len(one) == len(other) else float("inf")
    first, second = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    if first.shape != second.shape:
        return float("inf")
    return float((first - second).abs().nan_to_num(nan=float("inf")).max())  # `max` of Python would skip a NaN


if __name__ == "__main__":
    run(main)

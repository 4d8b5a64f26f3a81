"""Run a model on images, and convert its output to COCO results.

Large libraries are imported where they are used, so that the command answers quickly with its help and errors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation import devices

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode
    from PIL import Image

    from detection.evaluation.overlays import Classes

MOST_WAITING = 8  # batches' worth of images that wait for others of their size
IF_OUT_OF_MEMORY = ("CUDA_VISIBLE_DEVICES= uses the CPU", "free some of it, or use smaller images")  # GPU, host


def build_detector(name: str, weights_file: str, exact: bool = False) -> "tuple[CfgNode, torch.nn.Module]":
    """The config of a recipe, and its model in evaluation mode, filled from a checkpoint.

    Args:
        name: of the recipe, or its file.
        weights_file: a whole detector.
        exact: compute in float32 on the CPU, whatever the recipe says and the machine has.

    Raises:
        UserError: no such recipe or file, or the checkpoint does not fill the model.
    """
    from detection import config as configs
    from detection.training import trainer, weights

    config, _ = configs.for_one_process(configs.load(name, ["SOLVER.PRECISION", "float32"] if exact else []))
    config.MODEL.DEVICE = "cuda" if not exact and devices.is_usable() else "cpu"
    model = trainer.TransferTrainer.build_model(config)
    weights.load_detector(model, Path(weights_file))
    return config, model.eval()


def in_batches(
    model: "torch.nn.Module",
    config: "CfgNode",
    images: "Iterable[tuple[int, Image.Image]]",
    size: int,
    failed: Callable[[int, str], None],
) -> "Iterator[tuple[int, Image.Image, Mapping[str, Any]]]":
    """The model's output for each numbered image, in batches of images that it sees in one size.

    A batch of several sizes would be padded to the largest, and the padding changes what is found near the border. So
    images wait for others of their size, and come out in another order than they came in.

    Args:
        model: in evaluation mode.
        config: of the model.
        images: with their numbers.
        size: of a batch.
        failed: is called with the number of an image that cannot be processed, such as one of 5000 x 1 pixels, and the
            reason. The other images of its batch are not affected.

    Yields:
        (number, image, output): Detectron2's `instances` or `sem_seg` (C, H, W), in the image's own pixels, on the CPU.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Image.Image, torch.Tensor]]] = {}
    for number, image in images:
        try:
            pixels = to_tensor(image, config)
        except Exception as error:  # whatever resizing raises for sizes that it cannot handle
            failed(number, _cannot_be_processed(image, error))
            continue
        group = waiting.setdefault(tuple(pixels.shape), [])
        group.append((number, image, pixels))
        if len(group) == size:
            yield from _predict(model, waiting.pop(tuple(pixels.shape)), failed)
        elif sum(map(len, waiting.values())) >= MOST_WAITING * size:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            yield from _predict(model, waiting.pop(fullest), failed)
    for group in waiting.values():
        yield from _predict(model, group, failed)


def to_tensor(image: "Image.Image", config: "CfgNode") -> "torch.Tensor":
    """An image as the evaluation of the recipe shows it to the model: (3, H, W) uint8, resized."""
    import numpy
    import torch

    from foundation import detectron2_compat  # noqa: F401

    # isort: split
    from detectron2.data.transforms import ResizeShortestEdge

    pixels = numpy.asarray(image)  # (H, W, 3) RGB
    if config.INPUT.FORMAT == "BGR":
        pixels = pixels[:, :, ::-1]
    resize = ResizeShortestEdge(config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    resized = resize.get_transform(pixels).apply_image(pixels)
    return torch.from_numpy(numpy.ascontiguousarray(resized.transpose(2, 0, 1)))


def _predict(
    model: "torch.nn.Module",
    group: "Sequence[tuple[int, Image.Image, torch.Tensor]]",
    failed: Callable[[int, str], None],
) -> "Iterator[tuple[int, Image.Image, Mapping[str, Any]]]":
    """The outputs for images of one size, which fail or succeed together."""
    import torch

    inputs = [{"image": pixels, "height": image.height, "width": image.width} for _, image, pixels in group]
    try:
        with torch.inference_mode(), devices.report_out_of_memory(*IF_OUT_OF_MEMORY):
            outputs, reason = model(inputs), ""
    except Exception as error:  # whatever the layers of a model raise for sizes that they cannot handle
        outputs, reason = None, _cannot_be_processed(group[0][1], error)
    if outputs is None:  # only now is the memory free that the error's frames have kept
        if len(group) == 1:
            failed(group[0][0], reason)
            return
        for single in group:
            yield from _predict(model, [single], failed)
        return
    for (number, image, _), output in zip(group, outputs, strict=True):
        yield number, image, {key: value.to("cpu") for key, value in output.items() if hasattr(value, "to")}


def _cannot_be_processed(image: "Image.Image", error: Exception) -> str:
    return f"an image of {image.width} x {image.height} pixels cannot be processed: {error}"


def to_records(output: Mapping[str, Any], image_id: Any, classes: "Classes") -> list[dict[str, Any]]:
    """COCO results of one image: everything that the model finds, whatever its score.

    Of semantic segmentation there is a record for each class found, as COCO has it for stuff: with a mask, without box
    and score.
    """
    import numpy

    from foundation import detectron2_compat  # noqa: F401

    # isort: split
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from pycocotools import mask as coco_mask

    if "instances" in output:
        found = output["instances"]
        if found.has("pred_keypoints"):  # the conversion shifts them in place
            found = found[:]
            found.pred_keypoints = found.pred_keypoints.clone()
        records = instances_to_coco_json(found, image_id)
        for record in records:
            record["category_id"] = classes.ids[record["category_id"]]
        return list(records)
    labels = output["sem_seg"].argmax(dim=0).numpy()
    records = []
    for kind in sorted(set(labels.ravel().tolist())):
        code = coco_mask.encode(numpy.asfortranarray((labels == kind).astype("uint8")))
        segmentation = {"size": code["size"], "counts": code["counts"].decode()}
        records.append({"image_id": image_id, "category_id": classes.ids[kind], "segmentation": segmentation})
    return records

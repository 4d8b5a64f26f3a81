"""Export a fine-tuned detector as TorchScript, which runs without Detectron2 and this project.

    python detection/export.py --config RUN/config.yaml --weights RUN/model_final.pth --output detector.ts

The detector is traced on an image and compared with the original on that image and on one of another size; if
the outputs differ nothing is kept. Beside detector.ts, detector.json says what goes in and what comes out.

In: one image (3, H, W), uint8, in the order of colours and of the size that the note names. Out: a tuple of
tensors, boxes in pixels of that image. Masks are (N, 1, M, M) probabilities inside their boxes, to be pasted by
`torchvision.models.detection.roi_heads.paste_masks_in_image`.

    import torch, torchvision                     # torchvision registers the operators
    detector = torch.jit.load("detector.ts")
    outputs = dict(zip(json.load(open("detector.json"))["outputs"], detector(image)))
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from foundation.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode

TOLERANCE = 1e-3  # pixels and probabilities
EXAMPLE_SIZES = ((3, 4), (5, 4))  # height and width of the images that are compared, in quarters of the shortest side


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="the recipe, or RUN/config.yaml")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a whole detector: RUN/model_final.pth")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="for the TorchScript, as detector.ts"
    )
    parser.add_argument(
        "--images", nargs=2, metavar="IMAGE", help="two images of different sizes to compare on; else noise"
    )
    return parser


def trace(model: "torch.nn.Module", example: "torch.Tensor") -> "tuple[torch.jit.ScriptModule, list[str]]":
    """A detector as TorchScript, from an image (3, H, W) uint8; and the names of its outputs, in their order."""
    import torch

    flatten = import_flatten()
    names: list[str] = []

    def detect(module: Any, inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found = outputs_of(module, inputs[0]["image"])
        names[:] = sorted(found)
        return found

    adapter = flatten.TracingAdapter(model, [{"image": example}], detect)
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    return traced, names


def import_flatten() -> types.ModuleType:
    """`detectron2.export.flatten`, past the package's head, which in v0.6 imports the long gone caffe2."""
    from foundation import detectron2_compat  # noqa: F401

    # isort: split
    import detectron2

    try:
        return importlib.import_module("detectron2.export.flatten")
    except ImportError:
        stand_in = types.ModuleType("detectron2.export")
        stand_in.__path__ = [str(Path(str(detectron2.__file__)).parent / "export")]
        sys.modules["detectron2.export"] = stand_in
        try:
            return importlib.import_module("detectron2.export.flatten")
        finally:
            del sys.modules["detectron2.export"]


def outputs_of(model: Any, image: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """What a detector finds in an image (3, H, W), as named tensors, in the image's own pixels."""
    inputs = [{"image": image}]
    if hasattr(model, "inference"):  # masks stay as the head gives them: pasting them depends on each box
        found = model.inference(inputs, do_postprocess=False)[0]
    else:
        found = model(inputs)[0]["instances"]
    fields = found.get_fields()
    return {name.removeprefix("pred_"): getattr(value, "tensor", value) for name, value in fields.items()}


def compare(
    traced: Callable[["torch.Tensor"], "Sequence[torch.Tensor]"],
    names: Sequence[str],
    model: "torch.nn.Module",
    image: "torch.Tensor",
) -> int:
    """See that an exported detector finds in an image what the original does; the number of detections.

    Raises:
        UserError: it does not.
    """
    import torch

    size = "x".join(map(str, image.shape[:0:-1]))
    with torch.no_grad():
        expected, found = outputs_of(model, image), dict(zip(names, traced(image), strict=True))
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise UserError(f"the exported detector finds {len(found[name])} instead of {len(value)} objects in {size}")
        gap = (value.double() - found[name].double()).abs().max().item() if value.numel() else 0.0
        if not gap <= TOLERANCE:
            raise UserError(f"the exported detector differs from the original by {gap:.2g} in {name} of {size}")
    return len(expected["scores"])


def compare_without_threshold(model: "torch.nn.Module", images: "Sequence[torch.Tensor]") -> list[int]:
    """Trace a detector whose score threshold is 0 and compare it in images: where nothing is found, there is nothing to
    compare. The model is as before afterwards.

    Raises:
        UserError: the traced detector is not the original, or finds nothing even so.
    """
    import torch

    owner: Any = getattr(getattr(model, "roi_heads", None), "box_predictor", model)
    owner = owner[-1] if isinstance(owner, torch.nn.ModuleList) else owner  # of a cascade, the last decides
    threshold, owner.test_score_thresh = owner.test_score_thresh, 0.0
    try:
        traced, names = trace(model, images[0])
        counts = [compare(traced, names, model, image) for image in images]
    finally:
        owner.test_score_thresh = threshold
    if not any(counts):
        raise UserError("the detector finds no object in the images, which proves nothing: name others with --images")
    return counts


def example_images(config: "CfgNode", files: Sequence[str] | None) -> "list[torch.Tensor]":
    """Two images (3, H, W) uint8 of different sizes, as the model sees them: from files, or of noise.

    Raises:
        UserError: a file is not an image, or both are resized to one size.
    """
    import torch
    from PIL import Image

    from detection.inference import to_tensor
    from foundation.images import UnreadableImage, read_rgb

    if files:
        try:
            images = [to_tensor(Image.fromarray(read_rgb(Path(file))), config) for file in files]
        except UnreadableImage as error:
            raise UserError(f"--images: {error}") from error
    else:
        side = config.INPUT.MIN_SIZE_TEST
        noise = torch.Generator().manual_seed(0)
        shapes = [(3, side * height // 4, side * width // 4) for height, width in EXAMPLE_SIZES]
        images = [torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8) for shape in shapes]
    if images[0].shape == images[1].shape:
        raise UserError("--images: both are resized to one size; name two of different shapes")
    return images


def main(argv: Sequence[str] | None = None) -> None:
    """Trace, save, load again and compare.

    Raises:
        UserError: wrong use, or the exported detector is not the original.
    """
    arguments = build_parser().parse_args(argv)
    import torch

    from detection import inference

    config, model = inference.build_detector(arguments.config, arguments.weights, exact=True)
    if config.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        raise UserError("only detectors are exported, not semantic segmentation")
    images = example_images(config, arguments.images)
    traced, names = trace(model, images[0])
    draft = arguments.output.with_name(f"{arguments.output.name}.new")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            traced.save(str(draft))
            loaded = torch.jit.load(str(draft))
        counts, how = [compare(loaded, names, model, image) for image in images], ""
        if not any(counts):
            counts, how = compare_without_threshold(model, images), " if its score threshold is lowered to 0"
        arguments.output.with_suffix(".json").write_text(json.dumps(_note(config, names), indent=2) + "\n")
        os.replace(draft, arguments.output)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{arguments.output} cannot be written, or not be run: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    sizes = " and ".join("x".join(map(str, image.shape[:0:-1])) for image in images)
    found = f"{counts[0]} and {counts[1]} objects"
    print(f"{arguments.output}: finds the same {found} as the original{how}, in {sizes} pixels")


def _note(config: "CfgNode", names: Sequence[str]) -> dict[str, Any]:
    """What a program needs to know to use the file."""
    from detection.evaluation.overlays import classes_of

    sides = {"min_size": config.INPUT.MIN_SIZE_TEST, "max_size": config.INPUT.MAX_SIZE_TEST}
    return {"format": config.INPUT.FORMAT, **sides, "outputs": names, "classes": list(classes_of(config).names)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of each traced branch, which the comparison answers, and of TorchScript's deprecation."""
    import torch

    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

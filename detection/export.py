"""Export a fine-tuned detector as TorchScript or ONNX, which run without Detectron2 and this project.

    python detection/export.py --config RUN/config.yaml --weights RUN/model_final.pth --output detector.ts
    python detection/export.py --config RUN/config.yaml --weights RUN/model_final.pth --output detector.onnx

The detector is traced on an image. The written file is loaded again and compared with the original on that image and
on one of another size; if the outputs differ, the file is removed. Beside the file, detector.json describes inputs and
outputs.

Input: one image (3, H, W), uint8, with the colour order and the size that detector.json names. Output: a tuple of
tensors, with boxes in pixels of that image. Masks are (N, 1, M, M) probabilities inside their boxes, to be pasted by
`torchvision.models.detection.roi_heads.paste_masks_in_image`.

    import torch, torchvision                     # torchvision registers the operators
    detector = torch.jit.load("detector.ts")
    outputs = dict(zip(json.load(open("detector.json"))["outputs"], detector(image)))

    session = onnxruntime.InferenceSession("detector.onnx")                 # the same from ONNX, of a NumPy array
    outputs = dict(zip(json.load(open("detector.json"))["outputs"], session.run(None, {"image": image})))
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from foundation.errors import ArgumentParser, UserError, run
from foundation.files import write_atomic
from foundation.json_files import read_json

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode

# Pixels and probabilities. ONNX Runtime computes by other kernels than PyTorch.
TOLERANCES = {"torchscript": 1e-3, "onnx": 1e-2}
TORCHSCRIPT = (".ts", ".pt", ".pth", ".torchscript")
ENDINGS = {**dict.fromkeys(TORCHSCRIPT, "torchscript"), ".onnx": "onnx"}  # of --output; the formats they stand for
ONNX_START = b"\x08"  # the key of the first field of the protocol buffer, `ir_version`
OPSET = 17  # of ONNX; the first with aligned ROIAlign is 16
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Detect = Callable[["torch.Tensor"], "Sequence[torch.Tensor]"]  # from an image to the outputs, in a fixed order
DESCRIPTION = ("format", "min_size", "max_size", "outputs", "classes")  # keys of the file beside the exported one
EXAMPLE_SIZES = ((3, 4), (5, 4))  # height and width of the images that are compared, in quarters of the shortest side
UNRESIZED_SIDE = 800  # pixels of that side where INPUT.MIN_SIZE_TEST is 0, which leaves images as they are


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="the recipe, or RUN/config.yaml")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a whole detector: RUN/model_final.pth")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="as detector.ts, or detector.onnx for ONNX"
    )
    parser.add_argument(
        "--format",
        choices=tuple(TOLERANCES),
        help=f"by default onnx where FILE ends in .onnx, and torchscript for {', '.join(TORCHSCRIPT)}; onnx needs pip"
        f" install {' '.join(PACKAGES)}",
    )
    parser.add_argument(
        "--images", nargs=2, metavar="IMAGE", help="two images of different sizes to compare on; else noise"
    )
    return parser


def trace(model: "torch.nn.Module", example: "torch.Tensor") -> "tuple[torch.jit.ScriptModule, list[str]]":
    """A detector as TorchScript, from an image (3, H, W) uint8; and the names of its outputs, in their order."""
    import torch

    adapter, names = _flat(model, example)
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    return traced, names


def to_torchscript(model: "torch.nn.Module", example: "torch.Tensor", path: Path) -> tuple[Detect, list[str]]:
    """Write a detector as TorchScript. Returns what is in the file, and the names of its outputs."""
    import torch

    traced, names = trace(model, example)
    with _quiet():
        traced.save(str(path))
        return torch.jit.load(str(path)), names


def to_onnx(model: "torch.nn.Module", example: "torch.Tensor", path: Path) -> tuple[Detect, list[str]]:
    """Write a detector as ONNX. Returns what ONNX Runtime makes of the file, and the names of its outputs.

    By PyTorch's exporter of traces: its newer one, by `torch.export`, stops at Detectron2's branches on sizes
    (`GuardOnDataDependentSymNode`).

    Raises:
        UserError: a package is not installed, or the exporter cannot translate the model.
    """
    import torch

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime

    adapter, names = _flat(model, example)
    axes = {name: {0: "objects"} for name in names} | {"image": {1: "height", 2: "width"}}
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                *(adapter, adapter.flattened_inputs, str(path)),
                input_names=["image"],
                output_names=names,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"PyTorch cannot export this detector as ONNX: {reason}; use --format torchscript") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no class of their own
        raise _not_run(error) from error

    def detect(image: "torch.Tensor") -> "Sequence[torch.Tensor]":
        try:
            return [torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()})]
        except Exception as error:
            raise _not_run(error) from error

    return detect, names


def _not_run(error: Exception) -> UserError:
    """ONNX Runtime's error as one line."""
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"ONNX Runtime cannot run the exported detector: {reason}; use --format torchscript")


def _flat(model: "torch.nn.Module", example: "torch.Tensor") -> tuple[Any, list[str]]:
    """A module from an image to the tensors of `outputs_of`, and their names in its order."""
    import torch

    flatten = import_flatten()

    def detect(module: Any, inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return outputs_of(module, inputs[0]["image"])

    with torch.no_grad():
        names = sorted(outputs_of(model, example))
    return flatten.TracingAdapter(model, [{"image": example}], detect).eval(), names


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
    exported: Detect,
    names: Sequence[str],
    model: "torch.nn.Module",
    image: "torch.Tensor",
    tolerance: float = TOLERANCES["torchscript"],
) -> int:
    """See that an exported detector finds in an image what the original does; the number of detections.

    Raises:
        UserError: it does not.
    """
    import torch

    size = "x".join(map(str, image.shape[:0:-1]))
    with torch.no_grad():
        expected, found = outputs_of(model, image), dict(zip(names, exported(image), strict=True))
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise UserError(
                f"the exported detector finds {len(found[name])} instead of {len(value)} objects in an image of {size};"
                " try other images with --images"
            )
        gap = (value.double() - found[name].double()).abs().max().item() if value.numel() else 0.0
        if not gap <= tolerance:
            raise UserError(
                f"the exported detector differs from the original by {gap:.2g} in {name} in an image of {size}; try"
                " other images with --images"
            )
    return len(expected["scores"])


def compare_without_threshold(
    model: "torch.nn.Module",
    images: "Sequence[torch.Tensor]",
    convert: "Callable[[torch.nn.Module, torch.Tensor], tuple[Detect, list[str]]]" = trace,
    tolerance: float = TOLERANCES["torchscript"],
) -> list[int]:
    """Export a detector whose score threshold is 0 and compare it in images: where nothing is found, there is nothing
    to compare. The model is as before afterwards.

    Raises:
        UserError: the exported detector is not the original, or finds nothing even so.
    """
    import torch

    owner: Any = getattr(getattr(model, "roi_heads", None), "box_predictor", model)
    owner = owner[-1] if isinstance(owner, torch.nn.ModuleList) else owner  # of a cascade, the last decides
    threshold, owner.test_score_thresh = owner.test_score_thresh, 0.0
    try:
        exported, names = convert(model, images[0])
        counts = [compare(exported, names, model, image, tolerance) for image in images]
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
        side = min(config.INPUT.MIN_SIZE_TEST or UNRESIZED_SIDE, config.INPUT.MAX_SIZE_TEST)
        noise = torch.Generator().manual_seed(0)
        shapes = [(3, side * height // 4, side * width // 4) for height, width in EXAMPLE_SIZES]
        images = [torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8) for shape in shapes]
    if images[0].shape == images[1].shape:
        raise UserError("--images: both are resized to one size; name two of different shapes")
    return images


def check_target(output: Path, sources: Sequence[Path]) -> None:
    """See that an export overwrites nothing but an earlier export, its description beside it included.

    Args:
        output: the file to write.
        sources: files that are read.

    Raises:
        UserError: it would.
    """
    if output.is_dir() or output.suffix == ".json":  # the description beside it has that name
        raise UserError(f"--output {output} must be a file whose name does not end in .json: detector.ts")
    if output.resolve() in {file.resolve() for file in sources}:
        raise UserError(f"--output {output} is read: choose another name")
    description = output.with_suffix(".json")
    described = _is_description(description)
    if description.exists() and not described:
        raise UserError(
            f"{description} is not a description of an exported detector, which is written there: choose another"
            f" --output than {output}, or remove the file"
        )
    if output.exists() and not (described and _is_exported(output)):
        raise UserError(f"{output} is not an earlier export: choose another --output, or remove the file")


def _is_description(path: Path) -> bool:
    """Whether a file describes an exported detector."""
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and set(content) == set(DESCRIPTION)


def _is_exported(path: Path) -> bool:
    """Whether a file can be TorchScript or ONNX: the description may be of another file of that name, `model.ts` beside
    the checkpoint `model.pth`.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
        with path.open("rb") as file:
            return file.read(1) == ONNX_START
    except (OSError, zipfile.BadZipFile):
        return False


def format_of(output: Path) -> str:
    """The format that the ending of the file to write stands for: a key of `TOLERANCES`.

    Raises:
        UserError: it stands for none.
    """
    if output.suffix.lower() not in ENDINGS:
        raise UserError(
            f"--output {output}: its ending stands for no format; end it in .onnx for ONNX, or in"
            f" {', '.join(TORCHSCRIPT)} for TorchScript, or give --format"
        )
    return ENDINGS[output.suffix.lower()]


def main(argv: Sequence[str] | None = None) -> None:
    """Export, save, load again and compare.

    Raises:
        UserError: wrong use, or the exported detector is not the original.
    """
    arguments = build_parser().parse_args(argv)
    sources = (arguments.config, arguments.weights, *(arguments.images or ()))
    check_target(arguments.output, [Path(source) for source in sources])
    kind = arguments.format or format_of(arguments.output)
    from detection import inference

    config, model = inference.build_detector(arguments.config, arguments.weights, exact=True)
    if config.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        raise UserError("only detectors are exported, not semantic segmentation")
    if kind == "onnx" and config.MODEL.KEYPOINT_ON:
        raise UserError(
            "a detector of keypoints is not exported as ONNX: PyTorch's exporter stops at the resizing of each object's"
            " heat maps (aten::index on a tensor of unknown rank); use --format torchscript"
        )
    convert = {"onnx": to_onnx, "torchscript": to_torchscript}[kind]
    images = example_images(config, arguments.images)
    draft = arguments.output.with_name(f"{arguments.output.name}.new")
    trial = draft.with_name(f"{draft.name}.trial")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        loaded, names = convert(model, images[0], draft)
        counts, how = [compare(loaded, names, model, image, TOLERANCES[kind]) for image in images], ""
        if not any(counts):
            again = functools.partial(convert, path=trial)
            counts = compare_without_threshold(model, images, again, TOLERANCES[kind])
            how = " if its score threshold is lowered to 0"
        description = json.dumps(_describe(config, names), indent=2) + "\n"
        write_atomic(arguments.output.with_suffix(".json"), description.encode())
        os.replace(draft, arguments.output)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{arguments.output} cannot be written, or not be run: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
        trial.unlink(missing_ok=True)
    sizes = " and ".join("x".join(map(str, image.shape[:0:-1])) for image in images)
    found = f"{counts[0]} and {counts[1]} objects"
    print(f"{arguments.output}: finds the same {found} as the original{how}, in {sizes} pixels")


def _describe(config: "CfgNode", names: Sequence[str]) -> dict[str, Any]:
    """What a program needs to know to use the file."""
    from detection.evaluation.overlays import classes_of

    sizes = (config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    values = (config.INPUT.FORMAT, *sizes, names, list(classes_of(config).names))
    return dict(zip(DESCRIPTION, values, strict=True))


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

"""Draw what a fine-tuned detector finds in pictures.

    python detection/predict.py --config shapes_R18_FPN --weights RUN/model_final.pth PICTURES --output DIR

PICTURES are files or folders. For each, DIR gets a PNG of the same name with boxes, masks, classes and
scores; where two have the same name, all are numbered.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cli.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode
    from PIL import Image

    from detection.report_canvas import Shape

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="the recipe, or RUN/config.yaml")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a whole detector: RUN/model_final.pth")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--score-threshold", type=float, default=0.5, metavar="S", help="in 0..1; default 0.5")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="pictures, or folders of pictures")
    return parser


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and those in the folders named, each folder in the order of its names.

    Raises:
        UserError: a path does not exist, or a folder has no pictures.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path}: there is no such file or folder")
        inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"{path}: there are no pictures in this folder ({', '.join(SUFFIXES)})")
        found += inside
    return found


def read_image(path: Path) -> "Image.Image":
    """A picture as RGB, turned as its camera noted.

    Raises:
        UserError: the file is not a picture that Pillow can read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def build_detector(name: str, weights_file: str) -> "tuple[CfgNode, torch.nn.Module]":
    """The config of a recipe, and its model in evaluation mode, filled from a checkpoint.

    Raises:
        UserError: no such recipe or file, or the checkpoint does not fill the model.
    """
    import torch

    from detection import config as configs
    from detection import trainer, weights

    config, _ = configs.for_one_process(configs.load(name))
    config.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    model = trainer.TransferTrainer.build_model(config)
    weights.load_detector(model, Path(weights_file))
    return config, model.eval()


def detect(model: "torch.nn.Module", config: "CfgNode", image: "Image.Image") -> Any:
    """Detectron2's `Instances` for a picture, in its own pixels, on the CPU."""
    import numpy
    import torch

    from detection import compat  # noqa: F401

    # isort: split
    from detectron2.data.transforms import ResizeShortestEdge

    pixels = numpy.asarray(image)  # (H, W, 3) RGB
    if config.INPUT.FORMAT == "BGR":
        pixels = pixels[:, :, ::-1]
    resize = ResizeShortestEdge(config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST)
    resized = resize.get_transform(pixels).apply_image(pixels)
    tensor = torch.from_numpy(numpy.ascontiguousarray(resized.transpose(2, 0, 1)))
    with torch.inference_mode():
        found = model([{"image": tensor, "height": image.height, "width": image.width}])
    return found[0]["instances"].to("cpu")


def to_shapes(found: Any, names: Sequence[str], threshold: float) -> "list[Shape]":
    """What to draw: the detections with a score of at least `threshold`, the surest last and so on top."""
    from detection.report_canvas import Shape
    from detection.report_colours import of_classes

    colours = of_classes(range(len(names)))
    found = found[found.scores >= threshold]
    masks = found.pred_masks.numpy().astype("uint8") if found.has("pred_masks") else [None] * len(found)
    shapes = [
        Shape(tuple(box), mask, f"{names[kind]} {score:.2f}", colours[kind])
        for box, mask, kind, score in zip(
            found.pred_boxes.tensor.tolist(),
            masks,
            found.pred_classes.tolist(),
            found.scores.tolist(),
            strict=True,
        )
    ]
    return shapes[::-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Read, detect, draw, write, one picture after the other."""
    arguments = build_parser().parse_args(argv)
    if not 0 <= arguments.score_threshold <= 1:
        raise UserError(f"--score-threshold must be in 0..1, not {arguments.score_threshold}")
    files = find_images(arguments.images)
    config, model = build_detector(arguments.config, arguments.weights)

    from detection import datasets
    from detection.report_canvas import draw_scene

    names = datasets.class_names(config.DATASETS.TEST[0], config.MODEL.ROI_HEADS.NUM_CLASSES)
    output = Path(arguments.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: no pictures can be written there: {error.strerror or error}") from error
    numbered = len({file.stem for file in files}) < len(files)
    for index, file in enumerate(files):
        image = read_image(file)
        shapes = to_shapes(detect(model, config, image), names, arguments.score_threshold)
        target = output / (f"{index:04}_{file.stem}.png" if numbered else f"{file.stem}.png")
        draw_scene(image, shapes, file.name).save(target)
        print(f"{target}: {len(shapes)} objects")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

"""Draw what a fine-tuned detector finds in images, and write it as COCO results.

    python detection/predict.py --config RUN/config.yaml --weights RUN/model_final.pth IMAGES --output DIR
    python detection/predict.py --config RUN/config.yaml --weights RUN/model_final.pth IMAGES --json FILE

IMAGES are files or folders. For each image, DIR gets a PNG of the same name and size with boxes, masks, keypoints,
classes and scores, or the regions of semantic segmentation; where two images have the same name, all are numbered.

FILE gets everything that the model finds, whatever its score. The ids of images and categories are those of the COCO
file that --annotations names. Without it images are numbered from 1, and a second file, with `.images.json` for
`.json`, says which is which.

An image that cannot be read or processed is reported, and the others are processed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from detection.coco_results import Results
from foundation.errors import ArgumentParser, UserError, run
from foundation.images import EXTENSIONS, UnreadableImage, read_rgb

if TYPE_CHECKING:
    from PIL import Image

MOST_SCALE = 20.0
AUTO = "auto"


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="the recipe, or RUN/config.yaml")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a whole detector: RUN/model_final.pth")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the drawn images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the COCO results")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO json with the ids of the images")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time; default 1")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="enlarge the drawn images; default 1")
    parser.add_argument(
        "--score-threshold",
        type=threshold,
        default=0.5,
        metavar="S|auto",
        help="least score of what is drawn; default 0.5; auto: for each class the one with the best F1 in the run's"
        " evaluation",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="images, or folders of images")
    return parser


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and those in the folders named, each folder in the order of its names.

    Raises:
        UserError: a path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path}: there is no such file or folder")
        inside = sorted(
            entry for entry in path.iterdir() if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".")
        )
        if not inside:
            raise UserError(f"{path}: there are no images in this folder ({', '.join(EXTENSIONS)})")
        found += inside
    return found


def targets(files: Sequence[Path], folder: Path) -> list[Path]:
    """The PNG of each image: of its name, after a running number where two have the same."""
    numbered = len({file.stem for file in files}) < len(files)
    return [folder / (f"{i:04}_{file.stem}.png" if numbered else f"{file.stem}.png") for i, file in enumerate(files)]


def _read(files: Sequence[Path], failed: Callable[[int, str], None]) -> "Iterator[tuple[int, Image.Image]]":
    """The images with their places in `files`; `failed` is told of those that cannot be read."""
    from PIL import Image

    for index, file in enumerate(files):
        try:
            yield index, Image.fromarray(read_rgb(file))
        except UnreadableImage as error:
            failed(index, str(error))


def threshold(text: str) -> float | None:
    """The value of --score-threshold; None for `auto`."""
    return None if text == AUTO else float(text)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.score_threshold is not None and not 0 <= arguments.score_threshold <= 1:
        raise UserError(f"--score-threshold must be in 0..1 or auto, not {arguments.score_threshold}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    if not 0 < arguments.scale <= MOST_SCALE:
        raise UserError(f"--scale must be above 0 and at most {MOST_SCALE:g}, not {arguments.scale}")
    if not arguments.output and not arguments.json:
        raise UserError("name --output DIR for drawn images, or --json FILE for results, or both")
    if arguments.annotations and not arguments.json:
        raise UserError("--annotations gives the ids for --json FILE, which is not named")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, detect, draw and write, image by image.

    Raises:
        UserError: wrong use; or, after all others were processed, that some images failed.
    """
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    files = find_images(arguments.images)
    results = Results(files, arguments.annotations)
    drawn = targets(files, arguments.output) if arguments.output else []
    for folder in (arguments.output, arguments.json and arguments.json.parent):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error

    from detection import inference
    from detection.evaluation import overlays
    from detection.evaluation.operating_points import Thresholds, read_thresholds
    from foundation.canvas import draw_overlays

    chosen = arguments.score_threshold
    thresholds = read_thresholds(Path(arguments.weights).parent) if chosen is None else Thresholds(chosen, {})
    config, model = inference.build_detector(arguments.config, arguments.weights)
    classes = overlays.classes_of(config, results.categories)
    broken: list[Path] = []
    progress = tqdm(total=len(files), unit="img", disable=None)  # None: only on a terminal

    def failed(index: int, reason: str) -> None:
        broken.append(files[index])
        progress.write(reason)
        progress.update()

    empty, highest = 0, 0.0
    images = inference.in_batches(model, config, _read(files, failed), arguments.batch_size, failed)
    for index, image, output in images:
        objects = overlays.detected(output, classes, [thresholds.of(name) for name in classes.names])
        if drawn:
            draw_overlays(image, objects, arguments.scale).save(drawn[index])
        if arguments.json:
            results.add(index, image.size, inference.to_records(output, results.ids[index], classes))
        text = f"{len(objects)} objects"
        if not objects:
            score = overlays.highest_score(output)
            empty, highest = empty + 1, max(highest, score)
            text += f" (highest score {score:.2f}, --score-threshold {AUTO if chosen is None else f'{chosen:g}'})"
        progress.write(f"{drawn[index] if drawn else files[index]}: {text}")
        progress.update()
    progress.close()
    if empty == len(files) - len(broken) > 0:
        print(
            f"no image has an object with a score of {thresholds.overall:g} or more; the highest score is"
            f" {highest:.2f}: lower --score-threshold to see more"
        )
    if arguments.json:
        print(results.write(arguments.json, classes))
    if broken:
        names = ", ".join(map(str, broken[:3])) + (", ..." if len(broken) > 3 else "")
        raise UserError(f"{len(broken)} of the {len(files)} images failed: {names}; all others were processed")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

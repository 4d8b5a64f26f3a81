"""Draw what a fine-tuned detector finds in pictures, and write it as COCO results.

    python detection/predict.py --config shapes_R18_FPN --weights RUN/model_final.pth PICTURES --output DIR
    python detection/predict.py --config shapes_R18_FPN --weights RUN/model_final.pth PICTURES --json FILE

PICTURES are files or folders. For each, DIR gets a PNG of the same name and size with boxes, masks, joints,
classes and scores, or the regions of semantic segmentation; where two have the same name, all are numbered.

FILE gets everything that the model finds, whatever its score. The ids of images and categories are those of
the COCO file that --annotations names. Without it images are numbered from 1, and a second file, with
`.images.json` for `.json`, says which is which.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from detection.coco_results import Results
from foundation.errors import ArgumentParser, UserError, run

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MOST_SCALE = 20.0
INTERVAL = 10.0  # seconds between estimates of the time left where there is no terminal


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="the recipe, or RUN/config.yaml")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a whole detector: RUN/model_final.pth")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the COCO results")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO json with the ids of the images")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time; default 1")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="enlarge the pictures; default 1")
    parser.add_argument("--score-threshold", type=float, default=0.5, metavar="S", help="to be drawn; default 0.5")
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


def targets(files: Sequence[Path], folder: Path) -> list[Path]:
    """The PNG of each picture: of its name, behind a running number where two have the same."""
    numbered = len({file.stem for file in files}) < len(files)
    return [folder / (f"{i:04}_{file.stem}.png" if numbered else f"{file.stem}.png") for i, file in enumerate(files)]


class Progress:
    """A line for each picture, with a bar below them on a terminal, else with the time left now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._count = total, 0
        self._start = self._said = time.monotonic()
        self._bar = tqdm(total=total, unit="img", disable=not sys.stderr.isatty())

    def advance(self, text: str) -> None:
        """One picture is done; `text` says how it ended."""
        self._count += 1
        now = time.monotonic()
        if self._bar.disable and now - self._said >= INTERVAL:
            self._said = now
            left = (now - self._start) / self._count * (self._total - self._count)
            text += f" ({self._count}/{self._total}, eta {timedelta(seconds=round(left))})"
        self._bar.write(text)
        self._bar.update()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()


def _read(files: Sequence[Path], broken: list[Path], progress: Progress) -> "Iterator[tuple[int, Image.Image]]":
    """The pictures with their places in `files`; what is no picture is named, and put into `broken`."""
    for index, file in enumerate(files):
        try:
            yield index, read_image(file)
        except UserError as error:
            broken.append(file)
            progress.advance(str(error))


def _check(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.score_threshold <= 1:
        raise UserError(f"--score-threshold must be in 0..1, not {arguments.score_threshold}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    if not 0 < arguments.scale <= MOST_SCALE:
        raise UserError(f"--scale must be above 0 and at most {MOST_SCALE:g}, not {arguments.scale}")
    if not arguments.output and not arguments.json:
        raise UserError("name --output DIR for pictures, or --json FILE for results, or both")
    if arguments.annotations and not arguments.json:
        raise UserError("--annotations gives the ids for --json FILE, which is not named")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, detect, draw and write, picture by picture.

    Raises:
        UserError: wrong use; or, when all others are done, that some files are no pictures.
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
            raise UserError(f"{folder}: nothing can be written there: {error.strerror or error}") from error

    from detection import inference
    from foundation.canvas import draw_overlays

    config, model = inference.build_detector(arguments.config, arguments.weights)
    classes = inference.classes_of(config, results.categories)
    broken: list[Path] = []
    progress = Progress(len(files))
    pictures = _read(files, broken, progress)
    for index, image, output in inference.in_batches(model, config, pictures, arguments.batch_size):
        overlays = inference.to_overlays(output, classes, arguments.score_threshold)
        if drawn:
            draw_overlays(image, overlays, arguments.scale).save(drawn[index])
        if arguments.json:
            results.add(index, image.size, inference.to_records(output, results.ids[index], classes))
        progress.advance(f"{drawn[index] if drawn else files[index]}: {len(overlays)} objects")
    progress.close()
    if arguments.json:
        print(results.write(arguments.json, classes))
    if broken:
        names = ", ".join(map(str, broken[:3])) + (", ..." if len(broken) > 3 else "")
        raise UserError(f"{len(broken)} of the {len(files)} files are no pictures: {names}; all others are done")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

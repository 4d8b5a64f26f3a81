"""Draw what a fine-tuned detector finds in images, and write it as COCO results.

    python detection/predict.py --config RUN/config.yaml --weights RUN/model_final.pth IMAGES --output DIR
    python detection/predict.py --config RUN/config.yaml --weights RUN/model_final.pth IMAGES --json FILE

IMAGES are files or folders, of images and of videos (pip install av). For each image, DIR gets a PNG of the same name
with boxes, masks, keypoints, classes and scores, or the regions of semantic segmentation; for each video an MP4. Small
ones are enlarged, so that the labels do not hide the objects. Where two files have the same name, all are numbered.

FILE gets everything that the model finds, whatever its score. The ids of images and categories are those of the COCO
file that --annotations names. Without it images are numbered from 1, and a second file, with `.images.json` for
`.json`, says which is which; of videos each frame is an image.

An image that cannot be read or processed is reported, and the others are processed.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from detection.coco_results import Results, check_replaceable
from detection.video_files import VideoReader, VideoWriter, is_video
from foundation.errors import ArgumentParser, UserError, run
from foundation.files import check_writable, report_disk_errors
from foundation.images import EXTENSIONS, UnreadableImage, read_rgb
from foundation.names import counted

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
    parser.add_argument(
        "--scale",
        type=float,
        metavar="S",
        help="enlarge the drawn images; by default those with a longer side below 460 pixels, to that size",
    )
    parser.add_argument(
        "--score-threshold",
        type=threshold,
        default=0.5,
        metavar="S|auto",
        help="least score of what is drawn; default 0.5; auto: for each class the one with the best F1 in the run's"
        " evaluation",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="images and videos, or folders of them")
    return parser


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and those in the folders named, each folder in the order of its names; videos too.

    Raises:
        UserError: a path does not exist, or a folder has no images. Folders in it are not searched, and a line says so.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path}: there is no such file or folder")
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        inside = [entry for entry in entries if entry.suffix.lower() in EXTENSIONS or is_video(entry)]
        deeper = sum(entry.is_dir() for entry in entries)
        advice = f"; it has {counted(deeper, 'subfolder')}, not searched: name those too" if deeper else ""
        if not inside:
            raise UserError(f"{path}: there are no images or videos in this folder ({', '.join(EXTENSIONS)}){advice}")
        if advice:
            print(f"note: {path}: {len(inside)} images and videos{advice}")
        found += inside
    return found


def targets(files: Sequence[Path], folder: Path) -> list[Path]:
    """The PNG of each image and the MP4 of each video: of its name, after a running number where two have the same."""
    numbered = len({file.stem for file in files}) < len(files)
    endings = [".mp4" if is_video(file) else ".png" for file in files]
    names = [f"{i:04}_{file.stem}" if numbered else file.stem for i, file in enumerate(files)]
    return [folder / f"{name}{ending}" for name, ending in zip(names, endings, strict=True)]


def check_targets(targets: Sequence[Path], sources: Sequence[Path]) -> None:
    """See that no file that is written is one of those that are read. Raises UserError."""
    read = {file.resolve() for file in sources}
    for target in targets:
        if target.resolve() in read:
            raise UserError(f"{target} would be overwritten: choose another --output or --json")


def check_drawings(drawn: Sequence[Path], sources: Sequence[Path]) -> None:
    """See that no drawing replaces a file beside the images that are read, such as `a.png` beside `a.jpg`: it may be
    one of the user's. In other folders drawings of an earlier command are replaced. Raises UserError.
    """
    folders = {file.resolve().parent for file in sources}
    for path in drawn:
        if path.resolve().parent in folders and path.exists():
            raise UserError(f"{path} lies beside the images and would be replaced: choose another folder for --output")


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
    if arguments.scale is not None and not 0 < arguments.scale <= MOST_SCALE:
        raise UserError(f"--scale must be above 0 and at most {MOST_SCALE:g}, not {arguments.scale}")
    if not arguments.output and not arguments.json:
        raise UserError("name --output DIR for drawn images, or --json FILE for results, or both")
    if arguments.json and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder: name a file in it")
    if arguments.annotations and not arguments.json:
        raise UserError("--annotations gives the ids for --json FILE, which is not named")


def _below(score: float, threshold: float) -> str:
    """A score in two digits, or in as many as show that it is below the threshold."""
    digits = next((digits for digits in range(2, 8) if float(f"{score:.{digits}g}") < threshold), 2)
    return f"{score:.{digits}g}"


def _advise_on_threshold(threshold: float, highest: float) -> str:
    """What to do where no object has a score of `threshold` in any image, and the highest score is `highest`."""
    if not highest:
        return "the detector finds no object in any image, whatever the threshold: train it longer"
    unit = 100 if highest >= 0.01 else 10_000
    lower = math.floor(highest * unit) / unit
    return (
        f"no image has an object with a score of {threshold:g} or more; the highest score is"
        f" {_below(highest, threshold)}: --score-threshold {lower:g} draws it"
    )


class Prediction:
    """Images and videos through a detector, drawn and collected.

    Args:
        arguments: of the command.
        results: of all images.
        count: of the files.

    Attributes:
        broken: files that failed.
        classes: of the detector.
    """

    def __init__(self, arguments: argparse.Namespace, results: Results, count: int) -> None:
        from detection import inference
        from detection.evaluation import overlays
        from detection.evaluation.operating_points import Thresholds, read_thresholds
        from detection.training.outcome import predictions_of

        self._arguments, self._results = arguments, results
        self._chosen = arguments.score_threshold
        automatic = self._chosen is None
        self._thresholds = (
            read_thresholds(predictions_of(Path(arguments.weights))) if automatic else Thresholds(self._chosen, {})
        )
        self._config, self._model = inference.build_detector(arguments.config, arguments.weights)
        self.classes = overlays.classes_of(self._config, results.categories)
        self.broken: list[Path] = []
        self._shown, self._empty, self._highest = 0, 0, 0.0
        self._progress = tqdm(total=count, unit="img", disable=None)  # None: only on a terminal

    def images(self, files: Sequence[Path], drawn: Sequence[Path]) -> None:
        """Detect in the images, which are the first of the results; `drawn` are their PNGs, or nothing."""

        def failed(index: int, reason: str) -> None:
            self.fail(files[index], reason)

        for index, _, picture, text in self._detected(_read(files, failed), bool(drawn), failed):
            if picture:
                with report_disk_errors(drawn[index].parent):
                    picture.save(drawn[index])
            self._progress.write(f"{drawn[index] if drawn else files[index]}: {text}")
            self._progress.update()

    def video(self, file: Path, drawn: Path | None) -> None:
        """Detect in each frame of a video; `drawn` is the video of the drawn frames.

        Raises:
            UserError: it cannot be written.
        """
        objects, frames, problems = 0, 0, []
        reader = VideoReader(file)
        writer = VideoWriter(drawn, reader.rate) if drawn else None
        self._progress.total = (self._progress.total or 0) + (reader.length or 1) - 1

        def numbered() -> "Iterator[tuple[int, Image.Image]]":
            try:
                for number, (seconds, image) in enumerate(reader.frames()):
                    yield self._results.append(file, number, seconds), image
            except UserError as error:
                problems.append(str(error))

        def failed(index: int, reason: str) -> None:
            problems.append(reason)

        # Frames have one size, so that they come out in their order.
        for _, count, picture, _ in self._detected(numbered(), writer is not None, failed):
            objects, frames = objects + count, frames + 1
            if writer and picture:
                writer.write(picture)
            self._progress.update()
        if writer:
            writer.close()
        self._progress.write(f"{drawn or file}: {counted(objects, 'object')} in {counted(frames, 'frame')}")
        if problems:
            self.fail(file, problems[0])

    def close(self) -> None:
        """End the progress bar, and say so where nothing was found."""
        self._progress.close()
        if 0 < self._shown == self._empty:
            print(_advise_on_threshold(self._thresholds.overall, self._highest))

    def _detected(
        self, images: "Iterator[tuple[int, Image.Image]]", draw: bool, failed: Callable[[int, str], None]
    ) -> "Iterator[tuple[int, int, Image.Image | None, str]]":
        """(index, number of objects to draw, the drawn image, the number in words) of each image."""
        from detection import inference
        from detection.evaluation import overlays
        from foundation.canvas import draw_overlays, legible_scale

        arguments, classes = self._arguments, self.classes
        thresholds = [self._thresholds.of(name) for name in classes.names]
        batches = inference.in_batches(self._model, self._config, images, arguments.batch_size, failed)
        for index, image, output in batches:
            objects = overlays.detected(output, classes, thresholds)
            if arguments.json:
                records = inference.to_records(output, self._results.ids[index], classes)
                self._results.add(index, image.size, records)
            text = counted(len(objects), "object")
            self._shown += 1
            if not objects:
                score = overlays.highest_score(output)
                self._empty, self._highest = self._empty + 1, max(self._highest, score)
                threshold = AUTO if self._chosen is None else f"{self._chosen:g}"
                text += f" (highest score {_below(score, self._thresholds.overall)}, --score-threshold {threshold})"
            scale = arguments.scale or legible_scale(image)
            yield index, len(objects), draw_overlays(image, objects, scale) if draw else None, text

    def fail(self, file: Path, reason: str) -> None:
        """Report a file that cannot be processed."""
        self.broken.append(file)
        self._progress.write(reason)
        self._progress.update()


def main(argv: Sequence[str] | None = None) -> None:
    """Read, detect, draw and write, image by image.

    Raises:
        UserError: wrong use; or, after all others were processed, that some images failed.
    """
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    files = sorted(find_images(arguments.images), key=is_video)  # images first
    images = [file for file in files if not is_video(file)]
    if arguments.annotations and len(images) < len(files):
        raise UserError("--annotations lists images: name the videos in a command without it")
    results = Results(images, arguments.annotations)
    drawn = targets(files, arguments.output) if arguments.output else []
    written, known = ([path] if path else [] for path in (arguments.json, arguments.annotations))
    check_targets([*drawn, *written], [*files, *known])
    check_drawings(drawn, files)
    if arguments.json:
        check_replaceable(arguments.json, numbered=not arguments.annotations)
    if arguments.output:
        check_writable(arguments.output)
    for folder in (arguments.output, arguments.json and arguments.json.parent):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    prediction = Prediction(arguments, results, len(files))
    prediction.images(images, drawn[: len(images)])
    for place, file in enumerate(files[len(images) :], len(images)):
        try:
            prediction.video(file, drawn[place] if drawn else None)
        except UserError as error:
            prediction.fail(file, str(error))
    prediction.close()
    if arguments.json:
        print(results.write(arguments.json, prediction.classes))
    if prediction.broken:
        broken = prediction.broken
        names = ", ".join(map(str, broken[:3])) + (", ..." if len(broken) > 3 else "")
        raise UserError(f"{len(broken)} of the {len(files)} images failed: {names}; all others were processed")


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

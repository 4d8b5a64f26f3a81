"""The page of a report: which tables, figures and pictures it has, in which order, and their captions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from foundation.errors import UserError
from foundation.files import check_writable, write_atomic
from foundation.names import counted
from foundation.run_kinds import DETECTION, PRETRAIN
from reporting import scenes
from reporting.analysis import notes
from reporting.diagnosis import draw_confusion, draw_errors, draw_precision, draw_thresholds
from reporting.figures import SMOOTHED_SHARE, Colours, draw_curves, draw_label_curves, draw_transfer, label_colours
from reporting.groups import Setting, label_curves, leading, settings
from reporting.page import Block, Heading, Image, Paragraph, Table, to_html, to_markdown
from reporting.runs import Found
from reporting.tables import (
    best_table,
    class_table,
    dataset_tables,
    error_tables,
    label_tables,
    published_table,
    size_table,
    threshold_table,
    variant_tables,
)
from reporting.text import config_table, evaluation_tables, pretraining_tables, repeat_table, run_table, summary


def write_report(found: Found, title: str, folder: Path, tell: Callable[[str], None] = lambda line: None) -> None:
    """Write report.md and report.html with their pictures into a folder, which is made.

    Args:
        found: the runs.
        title: of the page.
        folder: for the files.
        tell: is called with what is done next, in words.

    Raises:
        UserError: the folder cannot be written.
    """
    check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        blocks = [*_body(settings(found.runs), folder, tell), *run_table(found.runs, found.skipped)]
        for name, page in (("report.md", to_markdown(title, blocks)), ("report.html", to_html(title, blocks, folder))):
            write_atomic(folder / name, page.encode("utf-8", "replace"))  # a folder's name may be no text
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error}") from error


def _body(found: Sequence[Setting], folder: Path, tell: Callable[[str], None]) -> list[Block]:
    """The page from the findings to the pictures, which are drawn into `folder`."""
    tell(f"tables and curves of {counted(len(found), 'setting')}")
    colours = label_colours(group.label for setting in found for group in setting.groups)
    blocks = [block for setting in found for block in summary(setting)]
    shown = leading(found)
    if draw_transfer(shown, colours, folder / "transfer.png"):
        blocks.append(Image("transfer.png", "AP of each initialisation", _TRANSFER_CAPTION))
    blocks += _labels(found, colours, folder)
    for title in dict.fromkeys(setting.kind.title for setting in found):
        blocks.append(Heading(title))
        of_kind = [setting for setting in found if setting.kind.title == title]
        if of_kind[0].kind.name == DETECTION:
            blocks += dataset_tables(of_kind)
        blocks += [block for setting in of_kind for block in _tables(setting)]
    if draw_curves(found, colours, folder / "curves.png"):
        blocks += [Heading("Training"), Image("curves.png", "Training curves", _CURVES_CAPTION)]
    detections = [setting for setting in shown if setting.kind.name == DETECTION]
    if detections:
        tell("classes, thresholds and errors of the detectors")
    blocks += _diagnosis(detections, colours, folder)
    return [*blocks, *_scenes(detections, colours, folder, tell)]


def _labels(found: Sequence[Setting], colours: Colours, folder: Path) -> list[Block]:
    """AP over the number of labelled images, if there are several."""
    curves = label_curves(found)
    if not curves:
        return []
    draw_label_curves(curves, colours, folder / "labels.png")
    image = Image("labels.png", "AP over the number of labelled images", _LABELS_CAPTION)
    return [Heading("Number of labels"), image, *label_tables(curves)]


def _tables(setting: Setting) -> list[Block]:
    """What the runs of a setting measured, beside what is published, and how they differ."""
    if setting.kind.name == PRETRAIN:
        return [*pretraining_tables(setting), *config_table(setting)]
    measured = [*evaluation_tables(setting), *size_table(setting), *variant_tables(setting), *best_table(setting)]
    measured += published_table(setting)
    return [*measured, *config_table(setting), *repeat_table(setting)]


def _diagnosis(found: Sequence[Setting], colours: Colours, folder: Path) -> list[Block]:
    """What is behind the AP: classes, precision and recall, score thresholds, confusions, errors by kind."""
    blocks: list[Block] = []
    classes = [block for setting in found for block in class_table(setting)]
    if classes:
        said = [Paragraph(f"{setting.name}: {note}.") for setting in found for note in notes(setting.runs)]
        blocks += [Heading("Classes"), *said, *classes]
    if draw_confusion(found, folder / "confusion.png"):
        blocks += [Heading("Confusions"), Image("confusion.png", "Confusion matrices", _CONFUSION_CAPTION)]
    if draw_precision(found, colours, folder / "precision.png"):
        blocks.append(Heading("Precision and recall"))
        blocks.append(Image("precision.png", "Precision over recall", _PRECISION_CAPTION))
    if draw_thresholds(found, colours, folder / "thresholds.png"):
        blocks.append(Heading("Score thresholds"))
        blocks.append(Image("thresholds.png", "Precision, recall and F1 over the score threshold", _THRESHOLD_CAPTION))
        blocks += [block for setting in found for block in threshold_table(setting)]
    if draw_errors(found, colours, folder / "errors.png"):
        blocks.append(Heading("Errors by kind"))
        blocks.append(Image("errors.png", "What each kind of error costs", _ERRORS_CAPTION))
        blocks += error_tables(found)
    return blocks


def _scenes(
    found: Sequence[Setting], colours: Mapping[str, str], folder: Path, tell: Callable[[str], None]
) -> list[Block]:
    """Images with what each detector finds, the worst ones, and those in which detectors differ; or why not."""
    blocks: list[Block] = [Heading("Scenes")] if found else []
    for number, setting in enumerate(found, start=1):
        tell(f"scenes of {setting.name}")
        try:
            blocks += _pictures(setting, colours, folder, "" if number == 1 else f"-{number}")
        except UserError as error:
            blocks.append(Paragraph(f"{setting.name}: no pictures of scenes, because {error}."))
    return blocks


def _pictures(setting: Setting, colours: Mapping[str, str], folder: Path, suffix: str) -> list[Block]:
    evaluation = scenes.load(setting)
    blocks: list[Block] = []
    for name, alt, draw in (
        ("predictions", "Scenes with ground truth and predictions", scenes.draw_predictions),
        ("worst", "The images with most errors", scenes.draw_worst),
        ("changes", "The images in which two detectors differ most", scenes.draw_changes),
    ):
        file = f"{name}{suffix}.png"
        caption = draw(evaluation, colours, folder / file)
        if caption is not None:
            blocks.append(Image(file, alt, f"{setting.name}. {caption}"))
    rows = scenes.change_rows(evaluation)
    if rows:
        title = f"Two detectors image by image: the runs with the lowest seeds ({setting.name})."
        blocks.append(Table(["", "number"], rows, title))
    return blocks


_TRANSFER_CAPTION = (
    "What detectors reach after fine-tuning. Bars: mean over runs; whiskers: sample standard deviation; points:"
    " single runs."
)
_LABELS_CAPTION = (
    "The same recipe on fewer labelled images. Lines: mean over runs; whiskers: sample standard deviation. Where a"
    " number of images was trained with several schedules, the longest is shown."
)
_CONFUSION_CAPTION = (
    "Boxes, or masks where boxes were not evaluated, at an IoU of 0.5 and the score threshold with the best F1. A row"
    " is the class of an object, a column what it was detected as; numbers and shades are percentages of the row. The"
    " last column is missed objects, the last row detections without an object; a class without objects is grey. One"
    " run for each initialisation."
)
_PRECISION_CAPTION = (
    "Precision at each recall, averaged over the classes, at two IoU thresholds and on average over ten; the area under"
    " the last is AP. Thick lines are means over runs, thin lines single runs."
)
_THRESHOLD_CAPTION = (
    "Precision, recall and F1 of all classes together at an IoU of 0.5, if only detections above a score count. Thick"
    " lines are means over runs, thin lines single runs; points are the thresholds with the best F1 of each run."
)
_ERRORS_CAPTION = (
    "By how many points AP50 would rise if every error of a kind, and no other, were corrected; whiskers: sample"
    " standard deviation over runs. Classification: right place, wrong class. Localisation: right class, IoU of"
    " 0.1 to 0.5. Both: wrong class and such an IoU. Duplicate: the object has been found already. Background: no"
    " object there. Missed: an object without any detection. After Bolya et al. 2020 (TIDE)."
)
_CURVES_CAPTION = (
    "Pretraining: the loss and its terms (the weighted attraction is the total minus the big-bang term), the"
    " learning rate and, if a run had a probe, its online accuracy; the terms are of CorInfoMax's loss only. Detection:"
    " thick lines are means over runs, thin lines single runs; the loss is a centred moving average over"
    f" {100 * SMOOTHED_SHARE:g} % of the run."
)

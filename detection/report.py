"""Set runs beside each other: `python detection/report.py RUN_DIR... --output DIR`.

What each directory holds - pretraining, a probe, fine-tuning on few labels, detection - is found out from
its files, and nothing else is read but the evaluation's images and annotations, and the results that a
recipe's file lists as published. A folder of runs stands for all in it. Runs that differ in their seed only
are averaged. DIR gets report.md, report.html with the pictures inside, and the pictures as PNG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from foundation.errors import ArgumentParser, UserError, run
from reporting.diagnosis import draw_errors, draw_label_curves, draw_precision, label_curves, leading
from reporting.figures import SMOOTHED_SHARE, draw_curves, draw_transfer, label_colours
from reporting.groups import Setting, settings
from reporting.page import Block, Heading, Paragraph, Picture, to_html, to_markdown
from reporting.runs import PRETRAIN, read_runs
from reporting.scenes import draw_predictions, obstacle
from reporting.tables import class_table, error_tables, label_tables, published_table
from reporting.text import config_table, evaluation_tables, pretraining_tables, run_table, summary


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="report.py", description="Set runs beside each other: tables, curves, scenes.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a finished run, or a folder of some")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the report")
    parser.add_argument("--title", default="Transfer of pretrained encoders", help="title of the page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, draw the pictures, write both pages."""
    arguments = build_parser().parse_args(argv)
    runs = read_runs(arguments.runs)
    found = settings(runs)
    output: Path = arguments.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        blocks = [*_body(found, output), *run_table(runs)]
        (output / "report.md").write_text(to_markdown(arguments.title, blocks))
        (output / "report.html").write_text(to_html(arguments.title, blocks, output))
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error}") from error
    print(f"The report on {len(runs)} runs is in {output / 'report.html'}")


def _body(found: Sequence[Setting], folder: Path) -> list[Block]:
    """The page from the findings to the curves; draws its pictures into `folder`."""
    colours = label_colours(group.label for setting in found for group in setting.groups)
    blocks = [block for setting in found for block in summary(setting)]
    shown = leading(found)
    if draw_transfer(shown, colours, folder / "transfer.png"):
        blocks.append(Picture("transfer.png", "AP of each initialisation", _TRANSFER_CAPTION))
    curves = label_curves(found)
    if curves:
        draw_label_curves(curves, colours, folder / "labels.png")
        blocks.append(Heading("Number of labels"))
        blocks.append(Picture("labels.png", "AP over the number of labelled images", _LABELS_CAPTION))
        blocks += label_tables(curves)
    for title in dict.fromkeys(setting.kind.title for setting in found):
        blocks.append(Heading(title))
        for setting in found:
            if setting.kind.title != title:
                continue
            if setting.kind.name == PRETRAIN:
                blocks += pretraining_tables(setting)
            else:
                blocks += [*evaluation_tables(setting), *published_table(setting), *config_table(setting)]
    if draw_curves(found, colours, folder / "curves.png"):
        blocks += [Heading("Training"), Picture("curves.png", "Training curves", _CURVES_CAPTION)]
    return [*blocks, *_diagnosis(shown, colours, folder), *_scenes(shown, colours, folder)]


def _diagnosis(found: Sequence[Setting], colours: Mapping[str, str], folder: Path) -> list[Block]:
    """What lies behind the AP: classes, precision over recall, and errors by kind."""
    blocks: list[Block] = []
    detections = [setting for setting in found if setting.kind.name == "detection"]
    classes = [block for setting in detections for block in class_table(setting)]
    if classes:
        blocks += [Heading("Classes"), *classes]
    if draw_precision(detections, colours, folder / "precision.png"):
        blocks.append(Heading("Precision and recall"))
        blocks.append(Picture("precision.png", "Precision over recall", _PRECISION_CAPTION))
    if draw_errors(detections, colours, folder / "errors.png"):
        blocks.append(Heading("Errors by kind"))
        blocks.append(Picture("errors.png", "What each kind of error costs", _ERRORS_CAPTION))
        blocks += error_tables(detections)
    return blocks


def _scenes(found: Sequence[Setting], colours: Mapping[str, str], folder: Path) -> list[Block]:
    """The same images by each detector, or why they cannot be drawn."""
    detections = [setting for setting in found if setting.kind.name == "detection"]
    blocks: list[Block] = [Heading("Scenes")] if detections else []
    for number, setting in enumerate(detections, start=1):
        reason = obstacle(setting)
        if reason:
            blocks.append(Paragraph(f"{setting.name}: {reason}"))
            continue
        file = "predictions.png" if number == 1 else f"predictions-{number}.png"
        caption = draw_predictions(setting, colours, folder / file)
        blocks.append(Picture(file, "Scenes with ground truth and predictions", f"{setting.name}. {caption}"))
    return blocks


_TRANSFER_CAPTION = (
    "What detectors reach after fine-tuning. Bars: mean over runs; whiskers: sample standard deviation; points:"
    " single runs."
)
_LABELS_CAPTION = (
    "The same recipe on fewer labelled images. Lines: mean over runs; whiskers: sample standard deviation. Where a"
    " number of images was trained with several schedules, the longest is shown."
)
_PRECISION_CAPTION = (
    "Precision at each recall, averaged over the classes, at two overlaps and on average over ten; the area under"
    " the last is AP. Thick lines are means over runs, thin lines single runs."
)
_ERRORS_CAPTION = (
    "By how many points AP50 would rise if every error of a kind, and no other, were put right; whiskers: sample"
    " standard deviation over runs. Classification: right place, wrong class. Localisation: right class, overlap of"
    " 0.1 to 0.5. Both: wrong class and such an overlap. Duplicate: the object was found already. Background: no"
    " object there. Missed: an object that no detection stands for. After Bolya et al. 2020 (TIDE)."
)
_CURVES_CAPTION = (
    "Pretraining: the loss and its terms (the weighted attraction is the total less the big-bang term), the"
    " learning rate, and the accuracy of a nearest-neighbour classifier during training. Detection: thick"
    " lines are means over runs, thin lines single runs; the loss is a centred moving average over"
    f" {100 * SMOOTHED_SHARE:g} % of the run."
)


def cli() -> NoReturn:
    """The command as a process: errors as one line, exit status 2."""
    run(main)


if __name__ == "__main__":
    cli()

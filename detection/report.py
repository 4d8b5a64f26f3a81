"""Set runs beside each other: `python detection/report.py RUN_DIR... --output DIR`.

What each directory holds - pretraining, a probe, fine-tuning on few labels, detection - is found out from
its files, and nothing else is read but the evaluation's images and annotations. Runs that differ in their
seed only are averaged. DIR gets report.md, report.html with the pictures inside, and the pictures as PNG.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cli.errors import ArgumentParser, UserError, run
from detection import report_colours
from detection.report_figures import SMOOTHED_SHARE, draw_curves, draw_transfer
from detection.report_groups import Setting, settings
from detection.report_page import Block, Heading, Paragraph, Picture, to_html, to_markdown
from detection.report_runs import PRETRAIN, read_runs
from detection.report_scenes import draw_predictions, obstacle
from detection.report_text import evaluation_tables, pretraining_tables, run_table, summary


def build_parser() -> ArgumentParser:
    """The arguments of the command."""
    parser = ArgumentParser(prog="report.py", description="Set runs beside each other: tables, curves, scenes.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="directory of a finished run")
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
    colours = report_colours.of_labels(group.label for setting in found for group in setting.groups)
    blocks = [block for setting in found for block in summary(setting)]
    if draw_transfer(found, colours, folder / "transfer.png"):
        blocks.append(Picture("transfer.png", "AP of each initialisation", _TRANSFER_CAPTION))
    for title in dict.fromkeys(setting.kind.title for setting in found):
        blocks.append(Heading(title))
        members = [setting for setting in found if setting.kind.title == title]
        for setting in members:
            is_pretraining = setting.kind.name == PRETRAIN
            blocks += pretraining_tables(setting) if is_pretraining else evaluation_tables(setting)
    if draw_curves(found, colours, folder / "curves.png"):
        blocks += [Heading("Training"), Picture("curves.png", "Training curves", _CURVES_CAPTION)]
    detections = [setting for setting in found if setting.kind.name == "detection"]
    if detections:
        blocks.append(Heading("Scenes"))
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
    "COCO AP of boxes and masks after fine-tuning. Bars: mean over runs; whiskers: sample standard deviation;"
    " points: single runs."
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

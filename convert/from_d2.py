"""Extract the encoder of a detector that Detectron2 trained, with torchvision's names.

    python convert/from_d2.py INPUT OUTPUT [--to torchvision|timm|safetensors] [--allow-unknown] [--overwrite]

INPUT is a checkpoint of a detector (`model_final.pth`), its run folder, or converted weights (`.pkl`). The values are
those of the file, bit for bit. The heads, and the normalisation that MoCo's protocol adds after res5, are left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from convert.export import SUFFIXES, export
from convert.naming import DETECTRON2
from convert.pixels import find_pixels
from convert.reader import checkpoint_in, read_checkpoint
from convert.selection import select
from convert.sidecar import describe
from convert.to_d2 import check_output, summarise
from foundation.errors import ArgumentParser, UserError, run


def main(argv: Sequence[str] | None = None) -> None:
    """Convert; see the module's docstring.

    Raises:
        UserError: the input is not one of Detectron2's, or anything else that the user can mend.
    """
    parser = ArgumentParser(prog="from_d2.py", description="Extract the encoder of a detector.")
    parser.add_argument("input", type=Path, help="a detector's checkpoint (.pth) or converted weights (.pkl)")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--to", choices=sorted(SUFFIXES.keys() - {"d2"}), default="torchvision", help="what to write")
    parser.add_argument(
        "--allow-unknown", action="store_true", help="read unknown classes in the file as empty records"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    arguments = parser.parse_args(argv)
    checkpoint = checkpoint_in(arguments.input)
    check_output(checkpoint, arguments.output, arguments.to, arguments.overwrite)
    source = read_checkpoint(checkpoint, arguments.allow_unknown)
    selection = select(source)
    if selection.candidate.scheme is not DETECTRON2:
        raise UserError(f"{source.path} is not one of Detectron2's files; convert/to_d2.py --to takes all others")
    pixels = find_pixels(source, selection)
    sidecar = describe(source, selection, pixels)
    export(source, arguments.output, arguments.to, selection, pixels, sidecar)
    print("\n".join(summarise(arguments.output, sidecar)))


def cli() -> NoReturn:
    """The command."""
    run(main)


if __name__ == "__main__":
    cli()

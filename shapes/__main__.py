"""Render the embedded dataset, and draw a sheet of samples from it.

python -m shapes [--root DIR] [--seed N] [--sheet FILE.png]
"""

from collections.abc import Sequence
from pathlib import Path

from foundation.errors import ArgumentParser, UserError, run
from shapes.cache import ensure_rendered
from shapes.sheet import draw_sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, render unless it is done, and print the folder."""
    parser = ArgumentParser(prog="python -m shapes", description="Render the embedded dataset.")
    parser.add_argument("--root", type=Path, help="where to; default: the cache folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="draw samples of the three parts to this picture")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be 0 or greater")
    root = ensure_rendered(arguments.root, seed=arguments.seed)
    if arguments.sheet is not None:
        sheet = draw_sheet(root)
        try:
            sheet.save(arguments.sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"--sheet {arguments.sheet} cannot be written: {error}") from error
    print(root)


if __name__ == "__main__":
    run(main)

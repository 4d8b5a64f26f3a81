"""Render the embedded dataset, and draw a sheet of samples from it.

python -m shapes [--root DIR] [--seed N] [--fraction F] [--sheet FILE.png]
"""

from collections.abc import Sequence
from pathlib import Path

from foundation.errors import ArgumentParser, UserError, run
from shapes.cache import ensure_rendered
from shapes.recipe import DEFAULT_RECIPE
from shapes.sheet import draw_sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, render unless it is done, and print the folder."""
    parser = ArgumentParser(prog="python -m shapes", description="Render the embedded dataset.")
    parser.add_argument("--root", type=Path, help="the folder to write; default: the cache folder")
    parser.add_argument("--seed", type=int, default=0, help="what the pictures are drawn from (default: 0)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="of the pictures to render; below 1 it needs --root"
    )
    parser.add_argument("--sheet", type=Path, help="write samples of the three parts to this picture")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be 0 or greater")
    if not 0 < arguments.fraction <= 1:
        raise UserError(f"--fraction is {arguments.fraction}; it must be above 0 and at most 1")
    if arguments.fraction < 1 and arguments.root is None:
        raise UserError("--fraction needs --root DIR: the cache folder holds the whole dataset")
    recipe = DEFAULT_RECIPE.scaled(arguments.fraction)
    root = ensure_rendered(arguments.root, seed=arguments.seed, recipe=recipe)
    if arguments.sheet is not None:
        sheet = draw_sheet(root)
        try:
            sheet.save(arguments.sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"--sheet {arguments.sheet} cannot be written: {error}") from error
    print(root)


if __name__ == "__main__":
    run(main)

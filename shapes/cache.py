"""The folder that holds a rendering: written once, complete or not at all."""

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from foundation.errors import UserError
from shapes.outlines import CLASSES
from shapes.recipe import DEFAULT_RECIPE, VERSION, Recipe
from shapes.render import counts, render

CARD = "dataset.json"  # written last


def ensure_rendered(
    root: Path | None = None,
    *,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
    recipe: Recipe = DEFAULT_RECIPE,
) -> Path:
    """The folder with the dataset, rendered now unless it exists.

    It is rendered beside its place and renamed when it is complete, so that a killed rendering leaves nothing
    that looks like a dataset. Of several processes that call at once, one renders and the others wait.

    Args:
        root: the folder; None for `$CORINFOMAX_CACHE/shapes-<version>`, or `~/.cache/corinfomax` without the
            variable, with the seed in the name where it is not 0.
        seed: of all random numbers.
        processes: how many render; None for one per available core. The result does not depend on it.
        progress: whether to show a bar on stderr.
        recipe: counts and sizes.

    Raises:
        UserError: the folder holds something else (another version, seed or recipe, an incomplete rendering, or
            files of the user's), or it cannot be written. Nothing is deleted.
    """
    advice = "set CORINFOMAX_CACHE to a folder" if root is None else "name a folder"
    root = default_root(seed) if root is None else Path(root)
    card = _card(seed, recipe)
    try:
        if _is_complete(root, card):
            return root
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not _is_complete(root, card):  # another process may have rendered it meanwhile
                _render_into_place(root, card, recipe, seed, processes or _available_cores(), progress)
    except OSError as error:
        raise UserError(
            f"the shapes dataset cannot be written to {root}: {error.strerror or error}; {advice} with 100 MB to spare"
        ) from error
    return root


def default_root(seed: int) -> Path:
    """Where a rendering with this seed belongs when no folder is named."""
    cache = Path(os.environ.get("CORINFOMAX_CACHE") or Path.home() / ".cache" / "corinfomax")
    return cache / (f"shapes-{VERSION}" if seed == 0 else f"shapes-{VERSION}-seed{seed}")


def _card(seed: int, recipe: Recipe) -> dict[str, Any]:
    """What `dataset.json` says of a rendering."""
    card = {
        "name": "shapes",
        "version": VERSION,
        "seed": seed,
        "classes": CLASSES,
        "counts": counts(recipe),
        "recipe": asdict(recipe),
    }
    return json.loads(json.dumps(card))  # as it will be read back: tuples are lists


def _is_complete(root: Path, card: dict[str, Any]) -> bool:
    """True if the folder holds this rendering, False if it is empty or does not exist.

    Raises:
        UserError: it holds something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    foreign = "DATA.NAME folder trains on images of your own; the shapes dataset needs a folder of its own"
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; {foreign}")
    try:
        found = dict(json.loads((root / CARD).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{root} does not hold the shapes dataset: it has no readable {CARD}; {foreign}") from None
    if found.get("name") != card["name"]:
        raise UserError(f"{root} does not hold the shapes dataset: {CARD} is of another kind; {foreign}")
    advice = "name another folder, or delete this rendering"
    for key, value in card.items():
        if found.get(key) != value:
            difference = f"its {key} is {found.get(key)!r}, not {value!r}"
            raise UserError(f"{root} holds another shapes dataset: {difference}; {advice}")
    for part, count in card["counts"].items():
        present = _pictures(root / part)
        if present != count:
            raise UserError(f"{root / part} holds {present} pictures instead of {count}; {advice}")
    for name in ("instances_train.json", "instances_val.json"):
        if not (root / "scenes/annotations" / name).is_file():
            raise UserError(f"{root / 'scenes/annotations' / name} is missing; {advice}")
    return True


def _pictures(folder: Path) -> int:
    """How many JPEGs a part holds, itself and in its class folders."""
    return sum(name.endswith(".jpg") for _, _, names in os.walk(folder) for name in names)


def _render_into_place(
    root: Path, card: dict[str, Any], recipe: Recipe, seed: int, processes: int, progress: bool
) -> None:
    """Render beside `root` and rename. Other temporary folders are of killed processes: the caller has the lock."""
    prefix = f".{root.name}.partial-"
    for stale in root.parent.glob(f"{prefix}*"):
        _remove(stale)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent) as temporary:
        folder = Path(temporary) / "dataset"
        folder.mkdir()
        render(folder, recipe, seed=seed, processes=processes, progress=progress)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
        folder.rename(root)


def _remove(folder: Path) -> None:
    """Delete a folder into which the orphaned workers of a killed process may write for another moment."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

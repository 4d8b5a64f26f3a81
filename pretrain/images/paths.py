"""What the paths on a command line hold: folders of images or tars, as values of DATA.NAME and DATA.ROOT."""

from collections.abc import Sequence
from pathlib import Path

from foundation.errors import UserError
from foundation.images import EXTENSIONS
from pretrain.images.shards import OBJECT_STORES, WEB, expand_braces, is_listing

REMOTE = (*WEB, *OBJECT_STORES)


def locate(paths: Sequence[str]) -> tuple[str, str]:
    """(DATA.NAME, DATA.ROOT) for one or several folders of images, or one or several tars.

    Several are joined in braces, `{/a,/b}`, which both kinds of source expand. Relative paths become absolute, so that
    the run can be resumed from another folder.

    Raises:
        UserError: a path does not exist, is a single image, is given twice or lies in another one, or images and tars
            are mixed, also in one folder, as in `training_tars`.
    """
    kinds = {path: _kind(path) for path in paths}
    if len(set(kinds.values())) > 1:
        tars, folders = ([path for path in paths if kinds[path] == kind] for kind in ("webdataset", "folder"))
        raise UserError(f"{tars[0]} holds tars and {folders[0]} images; give only one of the two kinds in one run")
    name = kinds[paths[0]]
    roots = [path if is_listing(path) and path.startswith(REMOTE) else str(Path(path).resolve()) for path in paths]
    if len(roots) == 1:
        return name, roots[0]
    if len(set(roots)) < len(roots):
        raise UserError(f"{next(root for root in roots if roots.count(root) > 1)} is given twice; give it once")
    if name == "webdataset":
        roots = [tar for root in roots for tar in (list(map(str, training_tars(Path(root)))) or [root])]
        if not all(root.endswith(".tar") for root in roots):
            raise UserError(f"several indexes cannot be joined: give tars, or one index; not {roots[0]}")
        return name, _braces([root.removesuffix(".tar") for root in roots]) + ".tar"
    for root in roots:
        outer = next((other for other in roots if other != root and Path(root).is_relative_to(other)), None)
        if outer:
            raise UserError(f"{root} lies in {outer}, so its images would count twice; give only one of the two")
    return name, _braces(roots)


def check_outside(output: Path, paths: Sequence[str]) -> None:
    """Check that results do not come among images: their pictures would be images of the next run.

    Raises:
        UserError: `output` is one of the folders, or lies in it.
    """
    for folder in map(Path, paths):
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"the results would be written to {output}, among the images of {folder}: choose another folder with "
                "--output"
            )


def split_roots(root: str) -> list[str]:
    """The folders of a DATA.ROOT: one, or those of its braces."""
    return [root] if Path(root).exists() else expand_braces(root)


def training_tars(folder: Path) -> list[Path]:
    """The tars of a folder to pretrain on: those of its train/, or its own where there is none.

    Raises:
        UserError: there are tars beside a train/ that holds none.
    """
    own, train = sorted(folder.glob("[!.]*.tar")), folder / "train"
    if not train.is_dir():
        return own
    inside = sorted(train.glob("[!.]*.tar"))
    if own and not inside:
        raise UserError(
            f"{folder} holds tars, and beside them {train}, which holds none: give the tars by their names, such as"
            f" {own[0]}, or {train} for the images in it"
        )
    return inside


def _kind(path: str) -> str:
    if path.startswith(REMOTE) or (is_listing(path) and Path(path).is_file()):
        return "webdataset"
    place = Path(path)
    if place.is_dir():
        return "webdataset" if training_tars(place) else "folder"
    if place.is_file():
        what = "is a single image" if path.lower().endswith(EXTENSIONS) else "is neither a folder nor a .tar"
        raise UserError(f"{path} {what}; give the folder that holds the images")
    raise UserError(
        f"there is no folder or tar {path}; PATH is a folder of images (config keys are written in capitals, and "
        "recipes are given by --config)"
    )


def _braces(parts: Sequence[str]) -> str:
    odd = next((part for part in parts if any(sign in part for sign in "{},")), None)
    if odd:
        raise UserError(f"{odd} has a comma or brace in its name, which cannot be joined with other paths; rename it")
    return parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"

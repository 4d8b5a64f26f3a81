"""The datasets of the recipes: registered with Detectron2, and checked before a run starts.

COCO and its relatives, VOC's boxes and Cityscapes are built into Detectron2 and lie under the folder
`DETECTRON2_DATASETS` (by default `datasets`). Added here are VOC's semantic segmentation; `shapes_train` and
`shapes_val`, this project's own, rendered when first asked for; and a user's data in COCO's format, under the name
`ANNOTATIONS.json@IMAGE_FOLDER`, which says all there is to know, so that a config names data and needs no more.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from fvcore.common.config import CfgNode

from detection.checks.folders import check_cityscapes, check_semantic, check_voc
from detection.checks.layout_json import check_coco, check_lvis, read_categories
from detection.data import optional_packages, voc_segmentation
from detection.data.requirements import Needs, needs_of
from foundation.errors import UserError

SHAPES = {"shapes_train": "train", "shapes_val": "val"}
CHECKS: dict[str, Callable[[str, Any, Needs], None]] = {
    "coco": check_coco,
    "lvis": check_lvis,
    "pascal_voc": check_voc,
    "cityscapes_instance": check_cityscapes,
    "cityscapes_sem_seg": check_cityscapes,
    "sem_seg": check_semantic,
}
OWN = ".json@"  # between the paths in the name of a user's own dataset
SEMANTIC = ("cityscapes_sem_seg", "sem_seg")


def register(names: Iterable[str]) -> None:
    """Make the datasets known to Detectron2; the embedded ones are rendered if they are not there yet.

    Raises:
        UserError: there is no dataset of that name; the nearest names are given. Or a package that reads the
            dataset is not installed.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            _register(name)
        if MetadataCatalog.get(name).get("evaluator_type") == "lvis":
            optional_packages.provide_lvis(name)


def custom_name(annotations: Path, images: Path) -> str:
    """The name under which a user's annotations in COCO's format and the folder of their images are registered.

    Raises:
        UserError: the file of annotations is no `.json`.
    """
    if annotations.suffix != ".json":
        raise UserError(f"{annotations}: annotations must be a file in COCO's format whose name ends in .json")
    return f"{annotations.resolve()}@{images.resolve()}"


def check_dataset(name: str, config: CfgNode) -> None:
    """See that a registered dataset is all there, and holds what the model of `config` asks for.

    Raises:
        UserError: something is missing or not as the format has it; the message names the path, and the key of the
            config where this is what disagrees.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    if kind not in CHECKS:
        raise UserError(f"dataset {name!r} has evaluator_type {kind!r}, which is none of {', '.join(CHECKS)}")
    needs = dataclasses.replace(needs_of(config), evaluated=name in config.DATASETS.TEST)
    if needs.semantic != (kind in SEMANTIC):
        holds = "a class for each pixel" if kind in SEMANTIC else "objects"
        raise UserError(
            f"dataset {name!r} holds {holds}, which the model does not learn: set DATASETS or MODEL.META_ARCHITECTURE"
        )
    CHECKS[kind](name, metadata, needs)


def check_same_classes(names: Iterable[str]) -> None:
    """See that registered datasets number the same classes in the same order, as those of one run must.

    Raises:
        UserError: they do not; names the first class that differs.
    """
    first, *others = names
    expected = known_classes(first)
    for other in others:
        for index, (one, two) in enumerate(zip(expected, known_classes(other), strict=False)):
            if one != two:
                raise UserError(f"class {index} is {one!r} in {first} but {two!r} in {other}: number the classes alike")


def count_classes(name: str) -> int:
    """The number of classes of a registered dataset, read from its file if it is a user's own.

    Raises:
        UserError: the file is missing, or not in COCO's format.
    """
    return len(known_classes(name))


def known_classes(name: str) -> list[str]:
    """Names of the classes of a registered dataset, in the model's order.

    Raises:
        UserError: the dataset is a user's own and its file is missing, or not in COCO's format.
    """
    metadata = MetadataCatalog.get(name)
    return _built_in_classes(metadata) or read_categories(Path(metadata.json_file))


def class_names(name: str, classes: int) -> list[str]:
    """Names of the model's classes, in its order; plain numbers where the dataset is not known here."""
    if name in SHAPES:
        from shapes import CLASSES

        return _fitting(list(CLASSES), classes)
    if OWN in name or name in voc_segmentation.SETS:
        register([name])
    metadata = MetadataCatalog.get(name)
    names = _built_in_classes(metadata)
    if not names and Path(metadata.get("json_file", "")).is_file():
        names = read_categories(Path(metadata.json_file))
    return _fitting(names, classes)


def _fitting(names: list[str], classes: int) -> list[str]:
    return names if len(names) == classes else [f"class {index}" for index in range(classes)]


def sources(name: str) -> dict[str, str]:
    """Where the images and the annotations of a registered dataset lie, as absolute paths."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname"):
        images, annotations = Path(metadata.dirname, "JPEGImages"), Path(metadata.dirname, "Annotations")
    else:
        images = Path(metadata.get("image_root") or metadata.image_dir)
        annotations = Path(metadata.get("json_file") or metadata.get("sem_seg_root") or metadata.gt_dir)
    return {"image_root": str(images.resolve()), "annotations": str(annotations.resolve())}


def subset(size: int, fraction: float, seed: int) -> list[int]:
    """Indices, ascending, of a share of `size` images, at least one.

    With the same seed, a smaller share is a part of a larger one.
    """
    order = numpy.random.default_rng(seed).permutation(size)
    return sorted(order[: max(1, round(size * fraction))].tolist())


def _built_in_classes(metadata: Any) -> list[str]:
    semantic = metadata.get("evaluator_type") in SEMANTIC
    return list(metadata.get("stuff_classes" if semantic else "thing_classes", ()))


def _register(name: str) -> None:
    annotations, own, images = name.partition(OWN)
    if own:
        register_coco_instances(name, {}, f"{annotations}.json", images)
    elif name in voc_segmentation.SETS:
        voc_segmentation.register(name)
    elif name in SHAPES:
        from shapes import ensure_rendered

        scenes = ensure_rendered() / "scenes"
        file = scenes / "annotations" / f"instances_{SHAPES[name]}.json"
        register_coco_instances(name, {}, str(file), str(scenes / SHAPES[name]))
    else:
        known = [*DatasetCatalog.list(), *SHAPES, *voc_segmentation.SETS]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise UserError(f"there is no dataset {name!r}; nearest: {', '.join(near)}")

"""The datasets of the recipes, registered with Detectron2.

COCO and its relatives, VOC's boxes and Cityscapes are built into Detectron2 and lie below the folder
`DETECTRON2_DATASETS` (by default `datasets`). Added here are VOC's semantic segmentation; `shapes_train` and
`shapes_val`, this project's own, rendered when first asked for; and a user's data in COCO's format, under the name
`ANNOTATIONS.json@IMAGE_FOLDER`, which holds everything that a config has to know of it.

Annotations in COCO's format and VOC's are read by this package (`annotations.py`, `voc.py`), whoever registered them.
"""

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from fvcore.common.config import CfgNode

from detection.data import optional_packages
from detection.data.annotations import category_records, keypoint_names, read_categories
from detection.data.coco_records import load_coco, note_keypoints
from detection.data.requirements import requirements_of
from detection.data.voc import load_segmentation, load_voc
from foundation.errors import UserError

EMBEDDED = {"shapes_train": "train", "shapes_val": "val"}
# VOC 2012's semantic segmentation. Name of the dataset: name of the list of images, folder of the labels.
VOC_SEGMENTATION = {
    "voc_2012_sem_seg_train": ("train", "SegmentationClass"),
    "voc_2012_sem_seg_trainaug": ("trainaug", "SegmentationClassAug"),
    "voc_2012_sem_seg_val": ("val", "SegmentationClass"),
}
VOC_SEGMENTATION_CLASSES = ("background", *CLASS_NAMES)
VOC_IGNORED = 255
CUSTOM = ".json@"  # between the paths in the name of a user's own dataset
ORIGINS: dict[str, str] = {}  # by the name of a part of a user's own dataset: the file and the part, for messages
SEMANTIC = ("cityscapes_sem_seg", "sem_seg")
LOADERS: dict[str, Callable[[str], Any]] = {"coco": load_coco, "pascal_voc": load_voc}


def register(names: Iterable[str]) -> None:
    """Make datasets known to Detectron2; the embedded ones are rendered if they are not there yet.

    Raises:
        UserError: there is no dataset of that name; the nearest names are given. Or a package that reads the
            dataset is not installed.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            _register(name)
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind in LOADERS:
            DatasetCatalog[name] = functools.partial(LOADERS[kind], name)
        if kind == "lvis":
            optional_packages.provide_lvis(name)


def custom_name(annotations: Path, images: Path) -> str:
    """The name under which a user's annotations in COCO's format and the folder of their images are registered.

    Raises:
        UserError: the name of the file of annotations does not end in `.json`, or a folder's has `CUSTOM` in it.
    """
    if annotations.suffix != ".json":
        raise UserError(f"{annotations}: annotations must be a file in COCO's format whose name ends in .json")
    if CUSTOM in str(annotations.resolve()):
        raise UserError(f"{annotations}: no folder above it may have {CUSTOM!r} in its name; rename the folder")
    return f"{annotations.resolve()}@{images.resolve()}"


def known_classes(name: str) -> list[str]:
    """Names of the classes of a registered dataset, in its order.

    Raises:
        UserError: the dataset is a user's own and its file is missing, or not in COCO's format.
    """
    metadata = MetadataCatalog.get(name)
    return _built_in_classes(metadata) or read_categories(Path(metadata.json_file))


def model_classes(config: CfgNode) -> list[str]:
    """Names of the model's classes, in its order: those that its run has noted, or of the first training set.

    Empty where they cannot be known: its file is not there, or it is not what the model was trained on, since its
    number of classes is another.
    """
    try:
        names = list(config.DATASETS.CLASSES)
        if not names:
            register(config.DATASETS.TRAIN[:1])
            names = known_classes(config.DATASETS.TRAIN[0])
    except (UserError, AttributeError):
        return []
    return names if len(names) == requirements_of(config).classes else []


def category_ids(config: CfgNode, name: str) -> list[Any]:
    """For each class of the model the id of the category of the same name in a dataset in COCO's format, or None.

    Where the names of the model's classes are not known, its classes are the dataset's categories, in their order.

    Raises:
        UserError: the file is missing or not in COCO's format.
    """
    categories = category_records(Path(MetadataCatalog.get(name).json_file))
    ids = {each["name"]: each["id"] for each in categories}
    names = model_classes(config)
    return [ids.get(each) for each in names] if names else list(ids.values())


def known_keypoints(name: str) -> list[str]:
    """Names of the keypoints of an object of a user's own dataset; empty where its categories name none.

    Raises:
        UserError: the file is missing or not in COCO's format.
    """
    return keypoint_names(category_records(Path(MetadataCatalog.get(name).json_file)))


def are_of_persons(keypoints: Sequence[str]) -> bool:
    """Whether keypoints are COCO's 17 of a person, by their names: for these its evaluation has tolerances."""
    return [each.lower().replace(" ", "_").replace("-", "_") for each in keypoints] == [*COCO_PERSON_KEYPOINT_NAMES]


def class_names(config: CfgNode) -> list[str]:
    """Names of the model's classes: those that its run has noted, or of the first dataset that has as many; else
    numbers.

    Unlike `model_classes` this renders no embedded dataset.
    """
    classes = requirements_of(config).classes
    if len(config.DATASETS.CLASSES) == classes:
        return list(config.DATASETS.CLASSES)
    for name in (config.DATASETS.TRAIN[0], config.DATASETS.TEST[0]):
        names = _names_if_there(name)
        if len(names) == classes:
            return names
    return [f"class {index}" for index in range(classes)]


def sources(name: str) -> dict[str, str]:
    """Where the images and the annotations of a registered dataset lie, as absolute paths."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname"):
        images, annotations = Path(metadata.dirname, "JPEGImages"), Path(metadata.dirname, "Annotations")
    else:
        images = Path(metadata.get("image_root") or metadata.image_dir)
        annotations = Path(metadata.get("json_file") or metadata.get("sem_seg_root") or metadata.gt_dir)
    return {"image_root": str(images.resolve()), "annotations": str(annotations.resolve())}


def labels(names: Sequence[str]) -> list[str]:
    """Short unlike names of several evaluation sets, for metrics and folders."""
    plain = [re.sub(r"[^\w-]+", "-", Path(name.partition(CUSTOM)[0]).name) for name in names]
    if len(set(plain)) == len(plain) and not {*plain} & {"EMA", "TTA"}:
        return plain
    return [f"{number}-{name}" for number, name in enumerate(plain, 1)]


def measured_on(names: Sequence[str], metric: str) -> str:
    """Which of the evaluation sets a metric is of: that whose label begins it, as `LABEL/bbox/AP`, or the first."""
    label = metric.partition("/")[0]
    return dict(zip(labels(names)[1:], names[1:], strict=True)).get(label, names[0])


def subset(size: int, fraction: float, seed: int) -> list[int]:
    """Indices, ascending, of a fraction of `size` images, at least one.

    With the same seed, a smaller fraction is a part of a larger one.
    """
    order = numpy.random.default_rng(seed).permutation(size)
    return sorted(order[: max(1, round(size * fraction))].tolist())


def _names_if_there(name: str) -> list[str]:
    """Names of a dataset's classes; empty where it is not known here, or its file is missing."""
    if name in EMBEDDED:
        from shapes import CLASSES

        return list(CLASSES)
    if CUSTOM in name or name in VOC_SEGMENTATION:
        register([name])
    metadata = MetadataCatalog.get(name)
    names = _built_in_classes(metadata)
    if not names and Path(metadata.get("json_file", "")).is_file():
        names = read_categories(Path(metadata.json_file))
    return names


def _built_in_classes(metadata: Any) -> list[str]:
    semantic = metadata.get("evaluator_type") in SEMANTIC
    return list(metadata.get("stuff_classes" if semantic else "thing_classes", ()))


def _register(name: str) -> None:
    annotations, custom, images = name.partition(CUSTOM)
    if custom:
        register_coco_instances(name, {}, f"{annotations}.json", images)
        note_keypoints(name)
    elif name in VOC_SEGMENTATION:
        _register_voc_segmentation(name)
    elif name in EMBEDDED:
        from shapes import ensure_rendered

        scenes = ensure_rendered() / "scenes"
        file = scenes / "annotations" / f"instances_{EMBEDDED[name]}.json"
        register_coco_instances(name, {}, str(file), str(scenes / EMBEDDED[name]))
    else:
        known = [*DatasetCatalog.list(), *EMBEDDED, *VOC_SEGMENTATION]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise UserError(f"there is no dataset {name!r}; nearest: {', '.join(near)}")


def _register_voc_segmentation(name: str) -> None:
    split, labels = VOC_SEGMENTATION[name]
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "VOC2012"
    names = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    DatasetCatalog.register(name, lambda: load_segmentation(names, folder / "JPEGImages", folder / labels))
    MetadataCatalog.get(name).set(
        stuff_classes=list(VOC_SEGMENTATION_CLASSES),
        ignore_label=VOC_IGNORED,
        evaluator_type="sem_seg",
        image_root=str(folder / "JPEGImages"),
        sem_seg_root=str(folder / labels),
        image_list=str(names),
    )

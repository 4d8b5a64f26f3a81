"""Look through the datasets of a recipe: what is wrong with them, and what a run makes of it.

    python detection/train_net.py --config coco_R50_C4 --check-data

A run stops at the first thing that is wrong; this lists all of it. COCO's and LVIS's JSON and Pascal VOC's XML
are read here, record by record; of any other registered dataset, what Detectron2's loader gives.
"""

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from detection.checks import coco, voc
from detection.checks import content as check_content
from detection.checks import findings as defects
from detection.checks.findings import Content, Findings, Picture, Use
from detection.data import datasets
from detection.data.requirements import needs_of

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

WIDTH = 110  # of the printed list


def run(config: "CfgNode") -> int:
    """Print what is wrong with the training and the test set of a config.

    Returns:
        An exit status: 0 if a run can go through all of it, 2 if not.

    Raises:
        UserError: there is no dataset of a name, or the model is of a kind that no recipe has.
    """
    datasets.register((*config.DATASETS.TRAIN, *config.DATASETS.TEST))
    errors = 0
    seen: list[tuple[Path, Content]] = []  # of training, with the folder of images
    for training, names in ((True, config.DATASETS.TRAIN), (False, config.DATASETS.TEST)):
        use = _use(config, training)
        for name in names:
            findings = Findings()
            print(f"looking through {name}", file=sys.stderr, flush=True)
            folder, content = check(name, use, findings)
            if content is not None:
                _compare(content, folder, seen, training, findings)
            print(_listing(name, use, content, findings))
            errors += sum(_consequence(each, use).level == "error" for each in findings)
    if errors:
        print(f"{errors} of these findings would stop a run." if errors > 1 else "One finding would stop a run.")
    else:
        print("Nothing here would stop a run.")
    return 2 if errors else 0


def check(name: str, use: Use, findings: Findings) -> tuple[Path, Content | None]:
    """Note everything wrong with a registered dataset; its folder of images and, if it can be read, its content."""
    metadata = MetadataCatalog.get(name)
    if "json_file" in metadata.as_dict() and metadata.get("evaluator_type") in ("coco", "lvis"):
        folder = Path(metadata.image_root)
        content = coco.read(Path(metadata.json_file), use, findings)
    elif metadata.get("evaluator_type") == "pascal_voc":
        folder = Path(metadata.dirname) / "JPEGImages"
        content = voc.read(Path(metadata.dirname), metadata.split, metadata.thing_classes, findings)
    else:
        folder, content = Path(), _read_registered(name, findings)
    if content is not None:
        if content.names and len(content.names) != use.classes:
            findings.add(defects.CLASS_COUNT, [f"{len(content.names)}, and the model has {use.classes}"])
        if content.names:
            check_content.check_objects(content, use, findings)
        check_content.check_files(content.pictures, folder, findings)
    return folder, content


def _use(config: "CfgNode", training: bool) -> Use:
    needs = needs_of(config)
    return Use(
        training=training,
        masks=needs.masks,
        polygons=needs.polygons,
        keypoints=needs.keypoints,
        drops_empty=config.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        classes=needs.classes,
    )


def _read_registered(name: str, findings: Findings) -> Content | None:
    """What Detectron2's own loader gives of a dataset: boxes and classes, or files of labels."""
    try:
        records = DatasetCatalog.get(name)
    except Exception as error:  # a loader may raise anything on files that are not as it expects
        findings.add(defects.UNREADABLE, [f"{name} ({type(error).__name__}: {error})"])
        return None
    _check_labels(records, findings)
    objects = [(row, each) for row, record in enumerate(records) for each in record.get("annotations", ())]
    boxes = [BoxMode.convert(list(each["bbox"]), each["bbox_mode"], BoxMode.XYXY_ABS) for _, each in objects]
    return Content(
        pictures=[Picture(record["file_name"], record.get("width", 0), record.get("height", 0)) for record in records],
        owners=numpy.array([row for row, _ in objects], dtype=numpy.int64),
        boxes=numpy.array(boxes, dtype=numpy.float64).reshape(-1, 4),
        classes=numpy.array([each["category_id"] for _, each in objects], dtype=numpy.int64),
        crowds=numpy.array([each.get("iscrowd", 0) != 0 for _, each in objects], dtype=bool),
        labels=[f"object {index}" for index in range(len(objects))],
        names=MetadataCatalog.get(name).get("thing_classes", []) if objects else [],
    )


def _check_labels(records: list[dict[str, Any]], findings: Findings) -> None:
    """Of semantic segmentation: each image has its file of labels, of its own size."""
    pairs = [(each["file_name"], each["sem_seg_file_name"]) for each in records if "sem_seg_file_name" in each]
    missing = check_content.missing_files([labels for _, labels in pairs], Path())
    findings.add(defects.MISSING_LABELS, missing)
    absent = set(missing)
    there = [pair for pair in pairs if pair[1] not in absent and Path(pair[0]).is_file()]
    sizes = [(labels, *(check_content.read_size(Path(path)) for path in (image, labels))) for image, labels in there]
    findings.add(
        defects.LABEL_SIZES,
        [f"{labels} ({second}, the image {first})" for labels, first, second in sizes if first != second],
    )


def _compare(
    content: Content, folder: Path, seen: list[tuple[Path, Content]], training: bool, findings: Findings
) -> None:
    """Hold a dataset against those of training before it, which `seen` collects."""
    files = {str(folder / each.file_name) for each in content.pictures}
    for place, other in seen:
        pairs = zip(content.names, other.names, strict=False)
        differing = [f"{mine} for {theirs}" for mine, theirs in pairs if mine != theirs]
        if len(content.names) != len(other.names):
            differing.append(f"{len(content.names)} for {len(other.names)}")
        findings.add(defects.OTHER_CLASSES, differing)
        if not training:
            shared = sorted(files & {str(place / each.file_name) for each in other.pictures})
            findings.add(defects.SHARED_FILES, shared)
    if training:
        seen.append((folder, content))


def _consequence(found: defects.Found, use: Use) -> defects.Consequence:
    return found.defect.training if use.training else found.defect.evaluation


def _listing(name: str, use: Use, content: Content | None, findings: Findings) -> str:
    """A heading, and a paragraph for each defect, the worst first."""
    role = "training" if use.training else "evaluation"
    lines = [f"{name} ({role})"]
    if content is not None:
        counts = (len(content.pictures), len(content.owners), len(content.names))
        lines[0] += ": {:,} images, {:,} objects, {:,} classes".format(*counts)
    order = ("error", "warning", "note")
    for found in sorted(findings, key=lambda each: order.index(_consequence(each, use).level)):
        consequence = _consequence(found, use)
        more = f", and {found.count - len(found.examples):,} more" if found.count > len(found.examples) else ""
        text = f"{found.count:>7,}  {found.defect.what}: {', '.join(found.examples)}{more} -> {consequence.text}"
        lines += textwrap.wrap(
            f"  {consequence.level:8}{text}", WIDTH, subsequent_indent=" " * 19, break_long_words=False
        )
    if len(lines) == 1:
        lines.append("  nothing is wrong")
    return "\n".join([*lines, ""])

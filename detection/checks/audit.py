"""Check the datasets of a recipe: what is wrong with them, and what a run does about it.

    python detection/train_net.py --config coco_R50_C4 --check-data

This lists everything. A run makes the same checks before it starts and stops at the first finding that is an error
(`preflight.py`); the one difference is that it decodes the images of evaluation only, and of training reads headers.
"""

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detectron2.data import MetadataCatalog

from detection.checks import findings as defects
from detection.checks.coco import check_coco, check_lvis
from detection.checks.content import check_files, check_objects
from detection.checks.findings import Content, Findings
from detection.checks.folders import check_cityscapes, check_semantic
from detection.checks.voc import check_voc
from detection.data import custom, datasets
from detection.data.requirements import Requirements, requirements_of
from foundation.names import counted

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

WIDTH = 110  # of the printed list
LEVELS = ("error", "warning", "note")
CHECKS: dict[str, Callable[[str, Any, Sequence[str], Requirements, Findings], Content | None]] = {
    "coco": check_coco,
    "lvis": check_lvis,
    "pascal_voc": check_voc,
    "cityscapes_instance": check_cityscapes,
    "cityscapes_sem_seg": check_cityscapes,
    "sem_seg": check_semantic,
}


def run(config: "CfgNode") -> int:
    """Print what is wrong with the training and the test set of a config; where the two are one, it is looked at once.

    Returns:
        An exit status: 0 if a run can go through all of it, 2 if not.

    Raises:
        UserError: there is no dataset of a name, or the model is of a kind that no recipe has.
    """
    datasets.register((*config.DATASETS.TRAIN, *config.DATASETS.TEST))
    model_classes, requirements = datasets.model_classes(config), requirements_of(config)
    errors = 0
    trained: list[Content] = []
    further = () if config.DATASETS.TEST == config.DATASETS.TRAIN else config.DATASETS.TEST
    for training, names in ((True, config.DATASETS.TRAIN), (False, further)):
        for name in names:
            findings = Findings(training, decode=True)
            print(f"looking through {name}", file=sys.stderr, flush=True)
            content = check_dataset(name, model_classes, requirements, findings)
            if content is not None and training:
                trained.append(content)
            elif content is not None:
                _compare_files(content, trained, findings)
            print(_listing(name, content, findings))
            errors += sum(findings.consequence(each).level == "error" for each in findings)
    if errors:
        print(f"{errors} of these findings would stop a run." if errors > 1 else "One finding would stop a run.")
    else:
        print("Nothing here would stop a run.")
    return 2 if errors else 0


def check_dataset(
    name: str, model_classes: Sequence[str], requirements: Requirements, findings: Findings
) -> Content | None:
    """Note everything that is wrong with a registered dataset.

    Args:
        name: of the dataset.
        model_classes: names of the model's classes; empty where they are not known.
        requirements: of the model.
        findings: takes what is found.

    Returns:
        The content, or None if nothing can be read.

    Raises:
        UserError: a package that reads the dataset is not installed.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    if kind not in CHECKS:
        findings.add(defects.UNSUPPORTED, [f"{name} has evaluator_type {kind!r}, not one of {', '.join(CHECKS)}"])
        return None
    if requirements.semantic != (kind in datasets.SEMANTIC):
        holds = "a class for each pixel" if kind in datasets.SEMANTIC else "objects"
        findings.add(defects.UNSUPPORTED, [f"{name} holds {holds}, which the model does not learn"])
        return None
    content = CHECKS[kind](name, metadata, model_classes, requirements, findings)
    if content is not None:
        if kind in ("coco", "lvis", "pascal_voc"):
            check_objects(content, requirements, findings)
        max_size = requirements.max_size_train if findings.training else requirements.max_size_test
        check_files(content.images, content.folder, max_size, findings)
    return content


def _compare_files(content: Content, trained: list[Content], findings: Findings) -> None:
    files = _resolve_files(content)
    for other in trained:
        shared = sorted(files & _resolve_files(other))
        findings.add(defects.SHARED_FILES, shared)


def _resolve_files(content: Content) -> set[str]:
    return {custom.resolve(content.folder, each.file_name) for each in content.images}


def _listing(name: str, content: Content | None, findings: Findings) -> str:
    """A heading, and a paragraph for each defect, the worst first."""
    role = "training" if findings.training else "evaluation"
    lines = [f"{name} ({role})"]
    if content is not None:
        counts = {"image": len(content.images), "object": len(content.owners), "class": len(content.names)}
        said = [counted(count, noun) for noun, count in counts.items() if count or noun != "object"]
        lines[0] += f": {', '.join(said)}"
    for found in sorted(findings, key=lambda each: LEVELS.index(findings.consequence(each).level)):
        consequence = findings.consequence(found)
        text = f"  {consequence.level:8}{found.count:>7,}  {found.text} -> {consequence.text}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 19, break_long_words=False)
    if len(lines) == 1:
        lines.append("  nothing is wrong")
    return "\n".join([*lines, ""])


def source(name: str) -> str:
    """What a message about a dataset begins with: its name and its file of annotations, if it has one.

    Of a part that the command has divided from a user's file, that is the user's file.
    """
    file = MetadataCatalog.get(name).get("json_file")
    if datasets.CUSTOM in name:
        return datasets.ORIGINS.get(name, str(file))
    return f"dataset {name} ({file})" if file else f"dataset {name}"

"""Annotations in Pascal VOC's layout: ImageSets/Main/SPLIT.txt, Annotations/NAME.xml, JPEGImages/NAME.jpg."""

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy
from tqdm import tqdm

from detection.checks import findings as defects
from detection.checks.content import missing_files
from detection.checks.findings import Content, Findings, Picture

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(folder: Path, split: str, names: Sequence[str], findings: Findings) -> Content | None:
    """What a split holds, with everything wrong in its files noted; None if there is no such split."""
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        identities = listing.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        findings.add(defects.UNREADABLE, [f"{listing} ({getattr(error, 'strerror', None) or error})"])
        return None
    files = [f"{identity}.xml" for identity in identities]
    missing = set(missing_files(files, folder / "Annotations"))
    findings.add(defects.UNREADABLE, sorted(missing), lambda name: f"{folder / 'Annotations' / name} (no such file)")
    pictures: list[Picture] = []
    objects: list[tuple[int, list[float], str, bool]] = []
    broken = []
    rest = [name for name in files if name not in missing]
    for name in tqdm(rest, "reading annotations", unit="file", disable=not sys.stderr.isatty()):
        try:
            tree = ElementTree.parse(folder / "Annotations" / name)
            width, height = (int(_text(tree.getroot(), f"size/{side}")) for side in ("width", "height"))
            inside = [_object(node) for node in tree.findall("object")]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            broken.append(f"{name} ({error})")
            continue
        objects += [(len(pictures), *each) for each in inside]
        pictures.append(Picture(f"{Path(name).stem}.jpg", width, height))
    findings.add(defects.MALFORMED, broken)
    order = {name: index for index, name in enumerate(names)}
    content = Content(
        pictures=pictures,
        owners=numpy.array([owner for owner, _, _, _ in objects], dtype=numpy.int64),
        boxes=numpy.array([box for _, box, _, _ in objects], dtype=numpy.float64).reshape(-1, 4),
        classes=numpy.array([order.get(kind, -1) for _, _, kind, _ in objects], dtype=numpy.int64),
        crowds=numpy.zeros(len(objects), dtype=bool),
        labels=[kind for _, _, kind, _ in objects],
        names=names,
    )
    findings.add(defects.UNKNOWN_CATEGORIES, numpy.flatnonzero(content.classes < 0), content.label)
    findings.add(defects.DIFFICULT, [i for i, (_, _, _, hard) in enumerate(objects) if hard], content.label)
    return content


def _object(node: ElementTree.Element) -> tuple[list[float], str, bool]:
    """Box, class, and whether it is difficult. The first pixel is 1, and the last belongs to the box."""
    left, top, right, bottom = (float(_text(node, f"bndbox/{corner}")) for corner in CORNERS)
    return [left - 1, top - 1, right, bottom], _text(node, "name"), node.findtext("difficult") == "1"


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"there is no {path}")
    return text

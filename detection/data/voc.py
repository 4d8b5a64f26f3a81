"""Pascal VOC's layout: the one reader of its lists and XML files, used by training, by evaluation and by the checks.

ImageSets/Main/SPLIT.txt            a name in each line; what follows the name is not read
Annotations/NAME.xml
JPEGImages/NAME.jpg
ImageSets/Segmentation/SPLIT.txt    semantic segmentation: names
SegmentationClass/NAME.png          and labels; 255 is ignored
SegmentationClassAug/NAME.png       labels with those of SBD, for the list trainaug
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from detection.data.masks import read_number, read_whole
from foundation.errors import UserError
from foundation.images import UnreadableImage, read_size

CORNERS = ("xmin", "ymin", "xmax", "ymax")
DECLARATION = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*\?>")
DIFFICULT = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}


class VocObject(NamedTuple):
    """An object of an XML file.

    Attributes:
        name: of its class.
        corners: left, top, right, bottom as in the file: the first pixel is 1, and the last one belongs to the box.
        difficult: detections of it count neither as right nor as wrong.
    """

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class VocImage(NamedTuple):
    """The content of an XML file; sizes are pixels."""

    width: int
    height: int
    objects: list[VocObject]


def list_path(folder: Path, split: str) -> Path:
    """The list of a split's images with boxes."""
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def read_list(path: Path) -> list[str]:
    """The first word of each line.

    Raises:
        UserError: the file cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def read_image(path: Path) -> VocImage:
    """The content of an XML file. Numbers may have a fraction; `difficult` may be missing or empty, which means 0.

    Raises:
        ValueError: it is not such a file; the message names the element.
    """
    try:
        root = _parse(path.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    width, height = (_convert(root, f"size/{side}", read_whole) for side in ("width", "height"))
    if min(width, height) < 1:
        raise ValueError("size/width and size/height must be at least 1")
    objects = []
    for index, node in enumerate(root.findall("object")):
        try:
            objects.append(_object(node))
        except ValueError as error:
            raise ValueError(f"object {index}: {error}") from error
    return VocImage(width, height, objects)


def load_voc(name: str) -> list[dict[str, Any]]:
    """Detectron2's records of a registered dataset with VOC's boxes, as its own reader makes them.

    Raises:
        UserError: a list or XML file cannot be read, or an object is of an unknown class.
    """
    metadata = MetadataCatalog.get(name)
    folder, classes = Path(metadata.dirname), {each: index for index, each in enumerate(metadata.thing_classes)}
    records = []
    for identity in read_list(list_path(folder, metadata.split)):
        path = folder / "Annotations" / f"{identity}.xml"
        try:
            image = read_image(path)
            objects = [
                {"category_id": classes[each.name], "bbox": to_box(each.corners), "bbox_mode": BoxMode.XYXY_ABS}
                for each in image.objects
            ]
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]!r} is not a class of {name}") from error
        records.append(
            {
                "file_name": str(folder / "JPEGImages" / f"{identity}.jpg"),
                "image_id": identity,
                "height": image.height,
                "width": image.width,
                "annotations": objects,
            }
        )
    return records


def to_box(corners: Sequence[float]) -> list[float]:
    """Left, top, right, bottom in coordinates, where the first pixel reaches from 0 to 1."""
    left, top, right, bottom = corners
    return [left - 1.0, top - 1.0, right, bottom]


def load_segmentation(names: Path, images: Path, labels: Path) -> list[dict[str, Any]]:
    """Detectron2's records of the images in a list, in its order.

    Args:
        names: the list.
        images: folder of the JPEGs.
        labels: folder of the PNGs with a class for each pixel.

    Raises:
        UserError: the list or an image cannot be read.
    """
    records = []
    for name in read_list(names):
        try:
            width, height = read_size(images / f"{name}.jpg")
        except UnreadableImage as error:
            raise UserError(f"{error}; replace the file, or take {name} out of {names}") from error
        records.append(
            {
                "file_name": str(images / f"{name}.jpg"),
                "sem_seg_file_name": str(labels / f"{name}.png"),
                "image_id": name,
                "height": height,
                "width": width,
            }
        )
    return records


def _parse(data: bytes) -> ElementTree.Element:
    """The root of an XML file in any encoding that Python knows; the parser knows few."""
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        declared = DECLARATION.match(data)
        if declared is None:
            raise ValueError(f"not valid XML: {error}") from error
    try:
        return ElementTree.fromstring(data[declared.end() :].decode(declared.group(1).decode()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not valid XML: {error}") from error


def _object(node: ElementTree.Element) -> VocObject:
    left, top, right, bottom = (_convert(node, f"bndbox/{corner}", read_number) for corner in CORNERS)
    difficult = (node.findtext("difficult") or "").strip().lower()
    if difficult not in DIFFICULT:
        raise ValueError(f"difficult is {difficult!r}: must be 0 or 1")
    return VocObject(_text(node, "name"), (left, top, right, bottom), DIFFICULT[difficult])


def _convert(node: ElementTree.Element, path: str, read: Any) -> Any:
    text = _text(node, path)
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{path} is {text!r}: {error}") from error


def _text(node: ElementTree.Element, path: str) -> str:
    text = (node.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"there is no {path}")
    return text

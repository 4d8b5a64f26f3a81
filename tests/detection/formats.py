"""The embedded scenes, written as each dataset of the protocol is laid out.

A folder that these functions filled can be the value of `DETECTRON2_DATASETS`. Classes take the names and numbers of
the dataset that is imitated: the eight outlines become its first eight classes.
"""

import contextlib
import json
import shutil
from xml.etree import ElementTree

from PIL import Image, ImageDraw

from shapes import Recipe, ensure_rendered

RECIPE = Recipe(unlabeled=0, objects_train=0, objects_val=0, scenes_train=4, scenes_val=2, scene_sides=(72, 96))
SPLITS = ("train", "val")


def render(root):
    """The few scenes that all formats are written from, in COCO's format."""
    return ensure_rendered(root, processes=1, progress=False, recipe=RECIPE) / "scenes"


def read(scenes, split):
    """(record of the image, its annotations, its path) of each scene."""
    content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
    for image in content["images"]:
        annotations = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        yield image, annotations, scenes / split / image["file_name"]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_coco(scenes, root):
    """coco/{train2017,val2017} and both files of annotations, of instances and of persons' keypoints."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    categories = [{"id": one["id"], "name": one["name"]} for one in COCO_CATEGORIES if one["isthing"]]
    for split in SPLITS:
        shutil.copytree(scenes / split, root / "coco" / f"{split}2017", dirs_exist_ok=True)
        content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        for one in content["annotations"]:
            one["category_id"] = categories[one["category_id"] - 1]["id"]
        folder = root / "coco" / "annotations"
        write_json(folder / f"instances_{split}2017.json", {**content, "categories": categories})
        for one in content["annotations"]:
            one.update(category_id=1, num_keypoints=17, keypoints=keypoints(one["bbox"]))
        persons = {**content, "categories": [{"id": 1, "name": "person"}]}
        write_json(folder / f"person_keypoints_{split}2017.json", persons)


def keypoints(box):
    """17 visible points on the diagonal of a box (x, y, width, height)."""
    x, y, width, height = box
    return [value for i in range(17) for value in (x + width * (i + 1) / 18, y + height * (i + 1) / 18, 2)]


def write_lvis(scenes, root):
    """lvis/lvis_v1_{train,val}.json, over COCO's images."""
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    write_coco(scenes, root)
    for split in SPLITS:
        content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        for image in content["images"]:
            name = image.pop("file_name")
            image.update(
                coco_url=f"http://images.example/{split}2017/{name}",
                neg_category_ids=[20, 21],
                not_exhaustive_category_ids=[],
            )
        write_json(root / "lvis" / f"lvis_v1_{split}.json", {**content, "categories": LVIS_CATEGORIES})


def write_voc(scenes, root):
    """VOC2007 with trainval and test, and VOC2012 with trainval."""
    for year, splits in (("VOC2007", {"trainval": "train", "test": "val"}), ("VOC2012", {"trainval": "train"})):
        for name, split in splits.items():
            ids = []
            for image, annotations, path in read(scenes, split):
                ids.append(f"{name}_{path.stem}")
                target = root / year / "JPEGImages" / f"{ids[-1]}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                xml = root / year / "Annotations" / f"{ids[-1]}.xml"
                xml.parent.mkdir(parents=True, exist_ok=True)
                voc_tree(image, annotations).write(xml)
            write_list(root / year / "ImageSets" / "Main" / f"{name}.txt", ids)


def voc_tree(image, annotations):
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for side in ("width", "height"):
        ElementTree.SubElement(size, side).text = str(image[side])
    for one in annotations:
        found = ElementTree.SubElement(root, "object")
        x, y, width, height = one["bbox"]
        fields = {"name": CLASS_NAMES[one["category_id"] - 1], "pose": "Left", "truncated": "0", "difficult": "0"}
        for name, value in fields.items():
            ElementTree.SubElement(found, name).text = value
        box = ElementTree.SubElement(found, "bndbox")
        sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}  # the first pixel is 1
        for name, value in sides.items():
            ElementTree.SubElement(box, name).text = str(round(value))
    return ElementTree.ElementTree(root)


def write_voc_segmentation(scenes, root):
    """VOC2012 with labels of pixels by palette, for train, trainaug and val; outlines are 255."""
    folder = root / "VOC2012"
    for split in SPLITS:
        ids = []
        for image, annotations, path in read(scenes, split):
            ids.append(f"segmented_{split}_{path.stem}")
            labels = Image.new("P", (image["width"], image["height"]))
            labels.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i * 151 % 256)])
            for polygon, one in polygons(annotations):
                ImageDraw.Draw(labels).polygon(polygon, fill=one["category_id"], outline=255)
            for target in ("SegmentationClass", "SegmentationClassAug"):
                (folder / target).mkdir(parents=True, exist_ok=True)
                labels.save(folder / target / f"{ids[-1]}.png")
            (folder / "JPEGImages").mkdir(exist_ok=True)
            shutil.copy(path, folder / "JPEGImages" / f"{ids[-1]}.jpg")
        for name in ("train", "trainaug") if split == "train" else ("val",):
            write_list(folder / "ImageSets" / "Segmentation" / f"{name}.txt", ids)


def write_cityscapes(scenes, root):
    """cityscapes/{leftImg8bit,gtFine}/{train,val}/town with every file of labels, on a ground of road."""
    from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

    road, things = CITYSCAPES_CATEGORIES[0], [one for one in CITYSCAPES_CATEGORIES if one["isthing"]]
    for split in SPLITS:
        images, labels = (root / "cityscapes" / name / split / "town" for name in ("leftImg8bit", "gtFine"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for image, annotations, path in read(scenes, split):
            core = f"town_{path.stem}_000019"
            size = (image["width"], image["height"])
            Image.open(path).save(images / f"{core}_leftImg8bit.png")
            pictures = {"labelIds": Image.new("L", size, road["id"]), "labelTrainIds": Image.new("L", size, 0)}
            pictures["instanceIds"] = Image.new("I;16", size, road["id"])
            corners = [[0, 0], [size[0] - 1, 0], [size[0] - 1, size[1] - 1], [0, size[1] - 1]]
            objects = [{"label": "road", "polygon": corners}]
            for number, (polygon, one) in enumerate(polygons(annotations)):
                thing = things[one["category_id"] - 1]
                values = (thing["id"], thing["trainId"], thing["id"] * 1000 + number)
                for picture, value in zip(pictures.values(), values, strict=True):
                    ImageDraw.Draw(picture).polygon(polygon, fill=value)
                objects.append({"label": thing["name"], "polygon": [list(map(round, point)) for point in polygon]})
            for name, picture in pictures.items():
                picture.save(labels / f"{core}_gtFine_{name}.png")
            content = {"imgWidth": size[0], "imgHeight": size[1], "objects": objects}
            write_json(labels / f"{core}_gtFine_polygons.json", content)


def polygons(annotations):
    """(points, annotation) of each polygon, from back to front."""
    for one in annotations:
        for points in one["segmentation"]:
            yield list(zip(points[::2], points[1::2], strict=True)), one


def write_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


@contextlib.contextmanager
def datasets_below(root, monkeypatch):
    """Detectron2's built-in datasets as they would be registered with `DETECTRON2_DATASETS` set to `root`."""
    import foundation.detectron2_compat  # noqa: F401

    # isort: split
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import builtin

    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    saved = [(catalog, dict(catalog.data)) for catalog in (DatasetCatalog, MetadataCatalog)]
    for catalog, _ in saved:
        catalog.data.clear()
    for register in ("coco", "lvis", "cityscapes", "pascal_voc"):
        getattr(builtin, f"register_all_{register}")(str(root))
    yield
    for catalog, content in saved:
        catalog.data.clear()
        catalog.data.update(content)

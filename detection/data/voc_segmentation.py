"""VOC 2012's semantic segmentation as Detectron2 datasets: 20 classes and the background.

Below the folder that `DETECTRON2_DATASETS` names:

    VOC2012/JPEGImages/*.jpg
    VOC2012/SegmentationClass/*.png             255 is ignored
    VOC2012/ImageSets/Segmentation/{train,val}.txt
    VOC2012/SegmentationClassAug/*.png          for trainaug: with the labels of SBD
    VOC2012/ImageSets/Segmentation/trainaug.txt
"""

import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image

from detection.checks.folders import read_list

# Name of the dataset: name of the list of images, folder of the labels.
SETS = {
    "voc_2012_sem_seg_train": ("train", "SegmentationClass"),
    "voc_2012_sem_seg_trainaug": ("trainaug", "SegmentationClassAug"),
    "voc_2012_sem_seg_val": ("val", "SegmentationClass"),
}
CLASSES = ("background", *CLASS_NAMES)
IGNORED = 255


def register(name: str) -> None:
    """Make one of `SETS` known to Detectron2, under the folder that `DETECTRON2_DATASETS` names now."""
    split, labels = SETS[name]
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "VOC2012"
    chosen = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    DatasetCatalog.register(name, lambda: read_records(chosen, folder / "JPEGImages", folder / labels))
    MetadataCatalog.get(name).set(
        stuff_classes=list(CLASSES),
        ignore_label=IGNORED,
        evaluator_type="sem_seg",
        image_root=str(folder / "JPEGImages"),
        sem_seg_root=str(folder / labels),
        image_list=str(chosen),
    )


def read_records(chosen: Path, images: Path, labels: Path) -> list[dict[str, Any]]:
    """Detectron2's records of the images in a list, in its order.

    Args:
        chosen: text file, the name of an image without ending in each line.
        images: folder of the JPEGs.
        labels: folder of the PNGs.
    """
    records = []
    for name in read_list(chosen):
        with Image.open(images / f"{name}.jpg") as picture:  # reads the header only
            width, height = picture.size
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

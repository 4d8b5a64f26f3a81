"""`--show-data N`: training images as the model gets them, after augmentation, with boxes, masks and keypoints."""

import itertools
from pathlib import Path

from detectron2.utils import comm
from fvcore.common.config import CfgNode
from PIL import Image

from detection.data import loading, training_data
from detection.evaluation import pictures
from detection.training import checkpoints, prepare
from foundation.errors import UserError

MOST = 100  # images
FILE = "training_images.png"


def write(config: CfgNode, count: int, processes: int) -> Path:
    """Draw the first `count` images of a run of so many processes as a sheet in its folder.

    Raises:
        UserError: the count is out of range, the datasets, the weights or the config would stop a run, or the folder
            cannot be written.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--show-data must be 1 to {MOST} images, not {count}")
    prepare.check_ahead(config, begun=checkpoints.exists(Path(config.OUTPUT_DIR)))
    sheet = draw(config, training_data.read(config), count, processes)
    path = Path(config.OUTPUT_DIR) / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def draw(config: CfgNode, images: training_data.TrainingSet, count: int, processes: int | None = None) -> Image.Image:
    """The first `count` images of a run, in the order in which it reads them.

    Args:
        config: of the run.
        images: its training set.
        count: of the images.
        processes: of the run; None is the number that there are.

    Raises:
        UserError: an image cannot be read.
    """
    single = config.clone()
    # As many as a process puts through the model at once: images are read in such groups, of wide or of tall ones.
    single.SOLVER.IMS_PER_BATCH //= (processes or comm.get_world_size()) * config.SOLVER.ACCUMULATION
    single.SOLVER.ACCUMULATION = 1
    single.MODEL.DEVICE = "cpu"  # where they are drawn
    batches = training_data.build_batches(single, images, loading.ProcessBatch(), config.SEED, workers=0)
    return pictures.training_sheet(config, itertools.islice(itertools.chain.from_iterable(batches), count))

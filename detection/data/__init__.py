"""The datasets of the recipes, registered with Detectron2, and the batches of training images.

Add a dataset in `datasets.py` and its requirements in `requirements.py`.
"""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

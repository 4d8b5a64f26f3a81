"""The datasets of the recipes, registered with Detectron2, the readers of their formats, and the batches for training.

Add a dataset in `datasets.py`; a format in a module of its own, beside `annotations.py` and `voc.py`, with a loader in
`datasets.LOADERS` and its checks in `detection/checks`. What a model requires of its data is in `requirements.py`.
"""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

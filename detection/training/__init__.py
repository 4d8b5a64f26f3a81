"""The training of one detector: weights in, steps, checkpoints, several runs of one recipe."""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

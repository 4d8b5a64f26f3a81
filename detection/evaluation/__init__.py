"""The evaluation of detectors: evaluators, average precision, run-length codes, kinds of error."""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

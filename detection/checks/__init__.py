"""The readers that decide whether a dataset can be trained on, before the first step and with `--check-data`.

Add a check to the module of its format, and its finding to `findings.py`.
"""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

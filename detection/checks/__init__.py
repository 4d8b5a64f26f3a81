"""The checks that decide whether a dataset can be trained and evaluated on, before a run and with `--check-data`.

Add a check to the module of its format, and its defect, with what it means for a run, to `findings.py`. A format gets
its own module, and an entry in `audit.CHECKS`.
"""

import foundation.detectron2_compat  # noqa: F401  before any module imports detectron2

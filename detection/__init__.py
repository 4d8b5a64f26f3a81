"""Fine-tuning of a detector on converted weights, with Detectron2.

Importing this package is cheap and does not need Detectron2. A module that imports `detectron2` imports
`foundation.detectron2_compat` before; the subpackages do so in their `__init__`.
"""

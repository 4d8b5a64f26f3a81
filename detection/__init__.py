"""Fine-tuning of a detector on converted weights, with Detectron2.

Importing this package is cheap and needs no Detectron2. Whoever imports `detectron2` imports
`detection.compat` first.
"""

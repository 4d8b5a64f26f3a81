"""Which images there are: folders, tars and named datasets as numbered sources of images and labels.

Add a dataset in `sources.py` (and in `labelled.py` if it has labels). Nothing here draws random numbers or augments.
"""

"""Which images there are: folders, tars and named datasets as numbered sources of encoded images and labels.

Add a dataset in `sources.py` (and in `labelled.py` where it has labels). Nothing here draws random numbers or augments.
"""

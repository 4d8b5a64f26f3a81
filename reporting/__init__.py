"""Reports over the run folders of all packages, read without torch: tables, figures, scenes, one HTML page.

Add a metric in `columns.py`, a table in `tables.py`, a figure in `figures.py`.
"""

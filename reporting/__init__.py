"""Reports on the run folders of all packages, read without torch: tables, figures, pictures of scenes, one HTML page.

The metrics of detectors are in `analysis.py` (`TASKS`), those of other runs in `foundation/run_kinds.py`. Add a table
in `tables.py`, a plot in `figures.py` or `diagnosis.py`, a picture in `scenes.py`, and its place on the page
in `compose.py`.
"""

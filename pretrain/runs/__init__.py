"""The files of a run: the folder, checkpoints, metrics, exported weights and results.

Every change must keep reading the files of earlier versions.
"""

"""Processes that train together: process group, BatchNorm over all of them, SLURM."""

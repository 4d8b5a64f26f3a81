"""Processes that train together: process group, SLURM, signals."""

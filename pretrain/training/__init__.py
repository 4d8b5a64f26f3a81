"""The pretraining run: its parts, the training step, the loop around it, and what it records.

Add an optimizer in `build.py`. The step and the loop do not read configuration files.
"""

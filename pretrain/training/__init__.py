"""The pretraining run: what a configuration is built into, the training step, the loop around it and what it records.

Add an optimizer in `build.py`. The step and the loop know nothing of configuration files.
"""

"""The encoder under evaluation: features, kNN, linear probe and fine-tuning, and the figures of a run.

Add an evaluation as a module here and a command beside `pretrain/linear.py`.
"""

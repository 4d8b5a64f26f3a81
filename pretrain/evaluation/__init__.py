"""The evaluation of an encoder: features, kNN, linear classifiers, fine-tuning, transfer, sweeps, and figures of runs.

A new evaluation is a module here and a command beside `pretrain/transfer.py`; `docs/architecture.md` has the rest.
"""

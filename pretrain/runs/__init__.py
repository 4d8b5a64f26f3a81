"""What lies on disk: the run folder, checkpoints, metrics, exported weights and results.

Whatever changes here must go on reading the files of earlier versions.
"""

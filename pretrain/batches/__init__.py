"""From a source to batches on the device: order, views, loader, augmentation.

All randomness is a function of (seed, epoch, image, view); nothing here depends on workers, processes or earlier steps.
"""

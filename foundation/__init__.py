"""Code that all packages share: configuration files, errors, atomic files, locks, devices, image decoding.

Nothing here imports another package of this project. A definition moves here when a second package needs it.
"""

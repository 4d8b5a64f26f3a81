"""The order of the images in an epoch: a function of the configuration and the dataset, and of nothing else."""

from collections.abc import Sequence

import numpy as np


def epoch_order(count: int, seed: int, epoch: int, shards: Sequence[int] = (), window: int = 0) -> np.ndarray:
    """The permutation of the images in an epoch, by (seed, epoch).

    Args:
        count: images.
        seed, epoch: what the permutation depends on.
        shards: images in each tar, in the order of the images; for `window` only.
        window: with fewer than there are, the tars are permuted and taken so many at a time, and images are permuted
            among those, so that no more tars are needed at a time; 0: all images are permuted together.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch]))
    if not 0 < window < len(shards):
        return rng.permutation(count)
    ends, tars = np.cumsum(shards), rng.permutation(len(shards))
    images = [np.arange(ends[tar] - shards[tar], ends[tar]) for tar in tars]
    return np.concatenate(
        [rng.permutation(np.concatenate(images[i : i + window])) for i in range(0, len(images), window)]
    )

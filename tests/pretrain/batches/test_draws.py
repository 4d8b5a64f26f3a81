"""Random numbers of views: those of NumPy's generator, and a function of seed, epoch, index and view."""

import numpy as np
import pytest

from pretrain.batches.draws import Augmentation, draw_crop, draw_photometric, random_stream

STRONG = Augmentation(
    flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray=0.2, blur=0.5, solarize=0.2
)
LARGEST = 2**32 - 1  # of a seed


@pytest.mark.parametrize(("height", "width"), [(375, 500), (3, 997), (1, 1)])
@pytest.mark.parametrize("seed", [0, LARGEST])
def test_draws_are_those_of_numpys_generator(seed: int, height: int, width: int) -> None:
    for index in range(200):
        theirs = np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, index, 7]))
        ours = random_stream(seed, 7, index, 1)
        for _ in range(3):  # more than the words that are taken at once
            assert draw_crop(STRONG, ours, height, width) == draw_crop(STRONG, theirs, height, width)  # type: ignore[arg-type]
            assert draw_photometric(STRONG, ours) == draw_photometric(STRONG, theirs)  # type: ignore[arg-type]


def test_whole_numbers_of_any_range_are_numpys() -> None:
    """Near the largest range every other number is rejected and drawn again."""
    theirs = np.random.Generator(np.random.Philox(key=3, counter=[0, 0, 0, 0]))
    ours = random_stream(3, 0, 0, 0)
    for count in (1, 2, 3, 24, 2**31 - 1, 2**31 + 1, 3 * 2**30, LARGEST) * 20:
        assert ours.integers(count) == theirs.integers(count)
    assert ours.random() == theirs.random()


def test_streams_differ_by_seed_epoch_index_and_view() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({random_stream(*key).random() for key in keys}) == 5
    assert random_stream(5, 6, 7, 1).random() == random_stream(5, 6, 7, 1).random()

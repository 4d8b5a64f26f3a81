"""Random numbers that are a function of where they are used, not of what was drawn before.

So a run draws the same numbers when it is killed and resumed, reads with another number of workers, or evaluates in
between.
"""

import enum
import random

import numpy
import torch


class Stream(enum.IntEnum):
    """What random numbers are drawn for; each purpose has a stream of its own."""

    ORDER = 0  # of the images, by epoch
    IMAGE = 1  # augmentation, by position in the stream of images
    PASS = 2  # of the model, which samples regions, by iteration and group of images
    PRECISE_BN = 3  # images and passes of the estimate of the batch norms' statistics


def generator(seed: int, purpose: Stream, *where: int) -> numpy.random.Generator:
    """The stream of this seed and place."""
    return numpy.random.Generator(numpy.random.Philox(numpy.random.SeedSequence((seed, purpose, *where))))


def seed_libraries(seed: int, purpose: Stream, *where: int) -> None:
    """Start Python's, NumPy's and PyTorch's (CPU and GPU) own generators from this seed and place."""
    words = numpy.random.SeedSequence((seed, purpose, *where)).generate_state(4)
    random.seed(int(words[0]))
    numpy.random.seed(words[1])
    number = int(words[2]) << 32 | int(words[3])
    # torch.manual_seed formats the call stack where CUDA is not in use, which takes as long as decoding a small image.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)

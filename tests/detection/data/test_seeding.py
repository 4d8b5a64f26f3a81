"""The libraries' own generators start from a seed and a place."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detection.data.seeding import Stream, seed_libraries


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_place_draws_the_same_numbers_and_another_place_others():
    draws = []
    for place in ((7, Stream.IMAGE, 3), (7, Stream.IMAGE, 4), (7, Stream.PASS, 3), (8, Stream.IMAGE, 3)):
        seed_libraries(*place)
        draws.append(draw())
        draw()
        seed_libraries(*place)
        assert draw() == draws[-1]
    for values in zip(*draws, strict=True):
        assert len(set(values)) == len(draws)


def test_pytorch_draws_what_its_own_manual_seed_gives():
    seed_libraries(7, Stream.IMAGE, 3)
    words = np.random.SeedSequence((7, Stream.IMAGE, 3)).generate_state(4)
    drawn = torch.rand(5)
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
    assert torch.equal(drawn, torch.rand(5))


@pytest.mark.cuda
def test_a_gpu_draws_the_same_numbers_at_the_same_place():
    torch.rand(1, device="cuda")  # CUDA is in use
    seed_libraries(7, Stream.PASS, 3)
    drawn = torch.rand(5, device="cuda")
    seed_libraries(7, Stream.PASS, 4)
    assert not torch.equal(drawn, torch.rand(5, device="cuda"))
    seed_libraries(7, Stream.PASS, 3)
    assert torch.equal(drawn, torch.rand(5, device="cuda"))

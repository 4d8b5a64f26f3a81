"""The order of training images, which must not depend on workers, processes or where a run was resumed."""

import itertools
import os
import random
import signal
from collections import Counter

import numpy
import pytest
import torch

pytest.importorskip("detectron2")

from detection.data import loading
from detection.data.loading import ProcessBatch, TrainingBatches
from foundation.errors import UserError

RECORDS = [{"file_name": f"{index}.jpg", "width": 60 + 20 * (index % 3), "height": 80} for index in range(7)]


def drawing(record):
    """A mapper that augments: it takes one number from each library's generator."""
    return {"name": record["file_name"], "drawn": (random.random(), numpy.random.random(), torch.rand(()).item())}


def batches(size=2, process_batch=None, workers=0, mapper=drawing, seed=5):
    wide = loading.are_wide(RECORDS)
    return TrainingBatches(
        RECORDS,
        mapper,
        lambda: loading.group(loading.shuffled(len(RECORDS), seed), size, wide),
        process_batch or ProcessBatch(),
        seed=seed,
        workers=workers,
        device=torch.device("cpu"),
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_each_image_once_an_epoch_and_each_epoch_in_an_order_of_its_own():
    order = take(loading.shuffled(50, seed=1), 150)
    epochs = [order[:50], order[50:100], order[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order != take(loading.shuffled(50, seed=2), 150)


def test_repeated_images():
    """Factors 1, 2 and 1.5: whole ones are exact in each epoch, a half is there in every second one."""
    first = [Counter(take(loading.repeated([1, 2, 3], seed), 6)) for seed in range(5)]
    assert all(counts == {0: 1, 1: 2, 2: 3} for counts in first)
    # 2,000 epochs of 3.5 images in the mean; the standard deviation of the share of index 1 is below 0.01.
    counts = Counter(take(loading.repeated([2.0, 1.5], seed=0), 7000))
    assert counts[1] / counts[0] == pytest.approx(0.75, abs=0.03)


def test_groups_by_hand():
    wide = [True, False, False, True, True]
    order = [0, 1, 2, 3, 4, 0]
    assert list(loading.group(order, 2, wide)) == [[(1, 1), (2, 2)], [(0, 0), (3, 3)], [(4, 4), (5, 0)]]
    assert list(loading.group(order, 3)) == [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4), (5, 0)]]


def test_wide_is_wider_than_high_as_in_detectron2():
    records = [{"width": 3, "height": 2}, {"width": 2, "height": 2}, {"width": 2, "height": 3}, {}]
    assert loading.are_wide(records) == [True, False, False, False]


@pytest.mark.parametrize("iteration", [1, 5, 23])
def test_from_any_iteration_on_it_is_the_same_sequence(iteration):
    process_batch = ProcessBatch(passes=2, processes=2, rank=1)
    whole = take(batches(process_batch=process_batch).starting(0), 60)
    assert take(batches(process_batch=process_batch).starting(iteration), 60 - 2 * iteration) == whole[2 * iteration :]


def test_processes_and_passes_are_interchangeable():
    """In each iteration 4 processes with one pass get what 2 with 2 passes, and one with 4 passes get."""

    def by_iteration(processes, passes):
        mine = [
            take(batches(process_batch=ProcessBatch(passes, processes, rank)).starting(0), 3 * passes)
            for rank in range(processes)
        ]
        return [
            [mine[rank][iteration * passes + number] for number in range(passes) for rank in range(processes)]
            for iteration in range(3)
        ]

    assert by_iteration(4, 1) == by_iteration(2, 2) == by_iteration(1, 4)


def test_workers_and_what_was_drawn_before_do_not_matter():
    alone = take(batches().starting(3), 8)
    torch.manual_seed(99)
    random.seed(99)
    numpy.random.seed(99)
    assert take(batches(workers=2).starting(3), 8) == alone
    assert take(iter(batches()), 11)[3:] == alone
    drawn = [image["drawn"] for batch in alone for image in batch]
    assert len({number for numbers in drawn for number in numbers}) == 3 * len(drawn)
    assert take(batches(seed=6).starting(3), 8) != alone


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers):
    def broken(record):
        raise UserError(f"{record['file_name']}: image file is truncated (3 bytes not processed)")

    with pytest.raises(UserError) as raised:
        next(batches(workers=workers, mapper=broken).starting(0))
    assert str(raised.value) in {f"{index}.jpg: image file is truncated (3 bytes not processed)" for index in range(7)}


def test_a_worker_that_is_killed_ends_the_run_with_an_explanation():
    def killed(record):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a process that reads images has died .* lower DATALOADER.NUM_WORKERS"):
        next(batches(workers=1, mapper=killed).starting(0))


def test_other_errors_keep_their_traceback():
    def wrong(record):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        next(batches(workers=1, mapper=wrong).starting(0))


def test_images_for_a_gpu_come_from_pinned_memory(monkeypatch):
    pinned, sent = [], []

    def pin(tensor):
        pinned.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr("torch.accelerator.is_available", lambda *_: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    monkeypatch.setattr(
        "torch.Tensor.to", lambda tensor, device, non_blocking: sent.append((device.type, non_blocking)) or tensor
    )
    record = {"file_name": "0.jpg", "image": torch.zeros(3, 4, 5, dtype=torch.uint8), "instances": object()}
    groups = loading.group(loading.shuffled(1, seed=0), 1)
    images = TrainingBatches(
        [record], dict, lambda: groups, ProcessBatch(), seed=0, workers=0, device=torch.device("cuda")
    )
    (found,) = next(iter(images))
    assert found.keys() == record.keys()
    assert found["instances"] is record["instances"]
    assert (pinned, sent) == ([(3, 4, 5)], [("cuda", True)])

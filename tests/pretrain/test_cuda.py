"""The code for GPUs, on fake tensors without one; and with a GPU, its results beside a CPU's."""

import contextlib
import json
import multiprocessing
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode

from foundation.errors import UserError
from foundation.images import OpenImage
from foundation.signals import StopRequest
from pretrain import gpu_kernels, train
from pretrain.batches.augment import BLUR_RADIUS, augment
from pretrain.batches.copying import copy_ahead
from pretrain.batches.draws import Param
from pretrain.batches.loader import build_loader, read_batches
from pretrain.batches.sampler import SequentialBatches, ShuffledBatches
from pretrain.batches.views import Batch, ViewDataset
from pretrain.config import get_defaults
from pretrain.corinfomax import CorInfoMaxLoss, Terms
from pretrain.distributed import group
from pretrain.distributed.batch_norm import GlobalBatchNorm, ViewBatchNorm
from pretrain.evaluation import knn, supervised
from pretrain.evaluation.features import _from_cache
from pretrain.images.sources import ArraySource, FileSource
from pretrain.pooling import MaxPool2d
from pretrain.runs import checkpoint
from pretrain.training import build, loop
from pretrain.training.cuda_graph import capture_step
from pretrain.training.dry_run import synthetic_batch
from pretrain.training.guard import PendingChecks
from pretrain.training.step import Trainer
from tests.pretrain.fake_cuda import CUDA, fake_cuda, pinned_batch, small_network

CPU = torch.device("cpu")


def small(**training: Any) -> CfgNode:
    config = get_defaults()
    config.DATA.IMAGE_SIZE, config.PROJECTOR.DIMS = 16, [16, 8]
    config.TRAIN.update(training)
    return config


def build_trainer(config: CfgNode, device: torch.device = CUDA) -> Trainer:
    torch.manual_seed(0)
    return build.build_trainer(config, build.build_parts(config, device), device, total_steps=10, steps_per_epoch=5)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for which Triton could not build the kernels."""
    monkeypatch.setattr(gpu_kernels, "can_build", lambda device: False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a real GPU, no process forks after a backward pass")
def test_a_process_forks_after_it_has_simulated_a_gpu() -> None:
    """Tests of several processes fork; they come in the same process, in any order."""
    backward = torch.ones(1, requires_grad=True).backward
    with fake_cuda():
        pass
    backward()
    child = multiprocessing.get_context("fork").Process(target=backward)
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize(("micro_batch", "precision", "kernels"), [(0, "auto", True), (4, "float32", False)])
def test_a_step_waits_for_nothing(
    micro_batch: int, precision: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first step sets things up. In the second all copies go to the GPU, from memory that it can read by itself;
    # a number that the host asks for, or an operand elsewhere, would have raised.
    config = small(MICRO_BATCH=micro_batch, PRECISION=precision)
    batch = synthetic_batch(config, 8)
    if not kernels:
        without_kernels(monkeypatch)
    with fake_cuda() as record:
        trainer = build_trainer(config)
        trainer.step(0, pinned_batch(batch))
        with record() as recorded:
            terms = trainer.step(1, pinned_batch(batch), stop=True)
        places = {term.device for term in terms} | {trainer.flags.device}
        gradients = [parameter.grad for parameter in trainer.network.parameters()]
    assert places == {CUDA}
    assert all(gradient is not None and gradient.device == CUDA for gradient in gradients)
    assert trainer.precision == ("bfloat16" if precision == "auto" else "float32")
    assert len(recorded.sent) == 4 if kernels else len(recorded.sent) > 10
    assert all(at_once for _, at_once in recorded.sent)
    assert recorded.fetched == []


@pytest.mark.parametrize("kernels", [True, False])
def test_augmentation_takes_parts_of_a_large_batch(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What comes between is then of the size of a part. 8 images of 16 pixels are three parts of at most three.
    if not kernels:
        without_kernels(monkeypatch)
    config = small()
    batch = synthetic_batch(config, 8)
    monkeypatch.setattr("pretrain.batches.augment.GPU_BYTES", 3 * 4 * 3 * 16 * 16)
    with fake_cuda() as record:
        pinned = pinned_batch(batch)
        images, mean = pinned.images[0].to(CUDA), torch.zeros(3, device=CUDA)
        with record() as recorded:
            views = augment(images, pinned.params[0], mean, mean, torch.bfloat16)
    assert views.shape == (8, 3, 16, 16)
    assert views.dtype == torch.bfloat16
    assert views.is_contiguous(memory_format=torch.channels_last)
    if kernels:
        assert [shape for shape, _ in recorded.sent] == [(3, len(Param) + 4), (3, len(Param) + 4), (2, len(Param) + 4)]
    else:
        assert recorded.largest == 3 * 3 * 16 * (16 + 2 * BLUR_RADIUS)  # a part with reflected borders


def test_images_are_copied_one_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is asked of the GPU's two streams, by number of the batch."""
    done: list[tuple[str, Any]] = []

    class Images:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, non_blocking: bool) -> "Images":
            assert (device, non_blocking, streams[-1]) == (CUDA, True, "copying")
            done.append(("copy", self.number))
            return self

        def record_stream(self, stream: Any) -> None:
            done.append(("keep until computed", self.number))

    class Event:
        def record(self) -> None:
            assert streams[-1] == "copying"
            self.number = done[-1][1]

    @contextlib.contextmanager
    def enter(stream: str) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    streams = ["computing"]
    waiting = types.SimpleNamespace(wait_event=lambda event: done.append(("wait for copy", event.number)))
    monkeypatch.setattr("torch.cuda.Stream", lambda device: "copying")
    monkeypatch.setattr("torch.cuda.stream", enter)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: waiting)
    closed: list[bool] = []

    def read() -> Iterator[Batch]:
        try:
            for number in range(3):
                yield Batch(Images(number), *[torch.zeros(1)] * 3, [])  # type: ignore[arg-type]
        finally:
            closed.append(True)

    for number, _ in enumerate(copy_ahead(read(), CUDA)):  # type: ignore[arg-type]
        done.append(("compute", number))
    here = [[("wait for copy", i), ("keep until computed", i), ("compute", i)] for i in range(3)]
    assert done == [("copy", 0), ("copy", 1), *here[0], ("copy", 2), *here[1], *here[2]]
    batches = copy_ahead(read(), CUDA)  # type: ignore[arg-type]
    next(batches)
    batches.close()
    assert closed == [True, True]


def test_references_come_to_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TRAIN_CHUNK", 8)
    train, labels, test = torch.randn(20, 5), torch.arange(20), torch.randn(7, 5)
    with fake_cuda() as record, record() as recorded:
        similarity, found = knn.nearest(train, labels, test, k=3, device=CUDA, chunk=2)
    assert similarity.shape == found.shape == (7, 3)
    assert {similarity.device.type, found.device.type} == {"cpu"}
    moved = [shape for shape, _ in recorded.sent]
    assert [moved.count(shape) for shape in ((8, 5), (4, 5))] == [2, 1]  # for four chunks of test images
    assert len(recorded.fetched) == 2


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_heads_learn_from_a_cache_without_waiting(name: str) -> None:
    batches = ShuffledBatches(12, batch_size=4, seed=0, first_step=0, last_step=2)
    head = supervised.LinearHeads(2, 5, 3, "normal")
    with fake_cuda() as record:
        cache = [torch.zeros(12, 5, device=CUDA)]
        labels = torch.zeros(12, dtype=torch.int64, device=CUDA)
        heads = head.to(CUDA)
        groups = [list(part.parameters()) for part in heads]
        optimizer = supervised.build_optimizer(name, groups, momentum=0.9, weight_decay=1e-4)
        trainer = supervised.SupervisedTrainer(heads, optimizer, [lambda epoch: 0.1] * 2)
        with record() as recorded:
            losses = [trainer.step(0, *part) for part in _from_cache(cache, labels, batches)]
    assert [loss.device for loss in losses] == [CUDA, CUDA]
    assert recorded.sent == [((4,), True)] * 2
    assert recorded.fetched == []


class Buffer:
    """Pinned memory and the event behind its copy, by what is done with them."""

    def __init__(self, done: list[str]) -> None:
        self._done, self._number = done, len(done)

    def copy_(self, flags: Any, non_blocking: bool) -> None:
        assert non_blocking
        self._done.append("copy")

    def record(self) -> None:
        self._done.append("record")

    def synchronize(self) -> None:
        self._done.append("wait")

    def tolist(self) -> list[float]:
        self._done.append("read")
        return [0.0, 1.0]


def test_flags_are_read_two_steps_later_when_their_copy_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    with fake_cuda():
        on_gpu = torch.zeros(2, device=CUDA)
    monkeypatch.setattr("torch.empty", lambda count, pin_memory: Buffer(done))
    monkeypatch.setattr("torch.cuda.Event", lambda: Buffer(done))
    checks = PendingChecks(CUDA)
    for step in range(4):
        checks.add(step, on_gpu)
        assert done[-2:] == ["copy", "record"]
        assert [check.step for check in checks.read()] == ([step - 2] if step >= 2 else [])
    assert done[-2:] == ["wait", "read"]
    assert [tuple(check) for check in checks.read(everything=True)] == [(2, False, True), (3, False, True)]


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have loaders pin memory as on a GPU, in a thread of their own; gives the shapes that they have pinned."""
    pinned: list[tuple[int, ...]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr("torch.accelerator.is_available", lambda *_: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_: CUDA)
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.set_device_index", lambda _: None)
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    return pinned


def gpu_loader(source: ArraySource) -> Any:
    batches = SequentialBatches(np.arange(len(source)), 2)
    return build_loader(ViewDataset(source, 8, []), batches, 1, CUDA, timeout=20)


def test_batches_are_pinned(pinning: list[tuple[int, ...]]) -> None:
    source = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, ["x"])
    assert [batch.indices.tolist() for batch in read_batches(gpu_loader(source))] == [[0, 1], [2, 3]]
    assert pinning == [(1, 2, 3, 8, 8), (2,)] * 2  # images and labels


class Treacherous(ArraySource):
    """Images of which the fourth kills the process that reads it."""

    def open(self, index: int) -> OpenImage:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index)


def test_a_worker_that_dies_is_named_while_memory_is_pinned(pinning: list[tuple[int, ...]]) -> None:
    source = Treacherous(np.zeros((8, 8, 8, 3), np.uint8), [0] * 8, ["x"])
    with pytest.raises(UserError, match=r"loader worker 0 \(process \d+\), at .* has died"):
        list(read_batches(gpu_loader(source)))


def test_a_damaged_image_is_named_while_memory_is_pinned(pinning: list[tuple[int, ...]], tmp_path: Path) -> None:
    source = FileSource([tmp_path / "gone.jpg"], [0], ["x"])
    with pytest.raises(UserError, match=r"gone.jpg: .*; check the dataset"):
        list(read_batches(gpu_loader(source)))


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = {"encoder.conv1.weight": torch.randn(2, 3)}
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:3")
        state = {"format": checkpoint.PRETRAIN, "model": encoder, "position": {"epoch": 1, "step": 2}}
        path = checkpoint.save(tmp_path, state)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path)
    found = checkpoint.load(path)["model"]["encoder.conv1.weight"]
    assert torch.equal(found, encoder["encoder.conv1.weight"])  # raises where they are on different devices


@pytest.mark.parametrize("error", [None, UserError("the disk is full")])
def test_processes_join_and_leave_with_their_gpu(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def join(backend: str, *, device_id: torch.device, **_: Any) -> None:
        done.append((backend, device_id))

    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: done.append(("set", device)))
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([(store, 5, 8)]))
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda *names, **by: done.append((*names, by["device_id"]))
    )
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: len(done) > 1)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: done.append("left"))
    own = torch.device("cuda", 1)
    with contextlib.suppress(UserError):
        assert group.start(use_cuda=True) == own
        try:
            if error:
                raise error
        finally:
            group.stop()
    # Before anything else, so that no memory is taken on the first GPU. After an error NCCL's end would wait for all.
    assert done == [("set", own), ("nccl", own), *([] if error else ["left"])]


def test_parts_have_two_images_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    # 9 images, at most 4 at a time: 3, 3 and 3, and not 4, 4 and one, which BatchNorm could not normalise.
    config = small(BATCH_SIZE=9, MICRO_BATCH=4, PRECISION="float32")
    monkeypatch.setattr(build, "build_network", small_network)
    trainer = build_trainer(config, CPU)
    seen: list[int] = []
    trainer.network.encoder.register_forward_hook(lambda module, views, features: seen.append(len(features)))
    trainer.step(0, synthetic_batch(config, 9))
    assert seen == [6] * 6  # both views of three pairs, without gradient and with


@pytest.mark.parametrize(("change", "key"), [({"MICRO_BATCH": 1}, "MICRO_BATCH"), ({"BATCH_SIZE": 1}, "BATCH_SIZE")])
def test_single_images_are_refused(change: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f"^TRAIN.{key}: BatchNorm needs at least two"):
        build_trainer(small(**change), CPU)


def test_the_checkpoint_of_a_run_that_is_stopped_counts_its_last_bad_batches() -> None:
    """On a GPU the flags come two steps late. Step 1 asks to stop, which step 3 sees; step 2 was bad."""
    saved: list[tuple[int, ...]] = []
    skipped = loop.Skipped(0, 10)
    batches = ShuffledBatches(40, batch_size=4, seed=0, first_step=0, last_step=9)
    loader = torch.utils.data.DataLoader(list(range(40)), batch_sampler=batches)  # type: ignore[arg-type]

    class Late(PendingChecks):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.lag = 2

    class FlaggedSteps:
        device = CPU

        def step(self, step: int, batch: Any, stop: bool, measure: bool) -> Terms:
            self.flags = torch.tensor([float(step == 2), float(step == 1)])
            return Terms(*torch.zeros(3))

    class Policy:
        due_by_steps = due_by_time = lambda *_: False

        def save(self, *position: int) -> None:
            saved.append(position)

    nothing = types.SimpleNamespace(unreadable=[], indices=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PendingChecks", Late)
        patch.setattr(loop, "read_batches", lambda loader: (nothing for _ in range(9)))
        complete = loop.train(
            FlaggedSteps(),  # type: ignore[arg-type]
            loader,
            first_step=0,
            last_step=9,
            steps_per_epoch=10,
            log_period=100,
            max_unreadable=0.0,
            skipped=skipped,
            recorder=None,
            request=StopRequest(),
            checkpoints=Policy(),  # type: ignore[arg-type]
            end_epoch=lambda *_: None,
        )
    assert not complete
    assert saved == [(0, 4, 1)]  # epochs and steps complete, batches skipped


@pytest.mark.cuda
class TestOnAGpu:
    """The results of a real one beside a CPU's."""

    @pytest.fixture(autouse=True)
    def _small_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "build_network", small_network)

    @pytest.mark.parametrize("kernels", [True, False])
    @pytest.mark.parametrize("size", [16, 33, 224])
    def test_augmentation(self, size: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        config = small()
        config.DATA.IMAGE_SIZE = size
        batch = synthetic_batch(config, 64 if size < 100 else 8)
        statistics = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.2])
        on_gpu = [part.to(CUDA) for part in statistics]
        assert gpu_kernels.can_build(CUDA)
        if not kernels:
            without_kernels(monkeypatch)
        for images, params in zip(batch.images, batch.params, strict=True):
            expected = augment(images, params, *statistics)
            found = augment(images.to(CUDA), params, *on_gpu)
            # Near the threshold of solarize a rounding error decides between x and 1 - x, which differ by 1 / 255.
            difference = (found.cpu() - expected).abs()
            assert (difference > 1e-4).float().mean() < 1e-4
            assert difference.max() < 0.03
            rounded = augment(images.to(CUDA), params, *on_gpu, dtype=torch.bfloat16)
            assert torch.equal(rounded, found.bfloat16())
            assert rounded.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("rank", [8, 2])
    def test_objective(self, rank: int) -> None:
        # In float64 on both; of rank 2 the covariance of a few steps is nearly singular.
        results = []
        for device in (CPU, CUDA):
            criterion = CorInfoMaxLoss(dim=8, attraction=100.0, forgetting=0.1, eps=1e-8).to(device)
            generator = torch.Generator().manual_seed(0)
            for _ in range(3):
                basis = torch.randn(rank, 8, generator=generator)
                z1, z2 = (torch.randn(16, rank, generator=generator) @ basis for _ in range(2))
                views = [torch.nn.functional.normalize(z, dim=1).to(device).requires_grad_() for z in (z1, z2)]
                terms = criterion(*views)
                results.append([*terms, *torch.autograd.grad(terms.total, views), criterion.covariance.clone()])
        for on_cpu, on_gpu in zip(results[:3], results[3:], strict=True):
            for expected, found in zip(on_cpu, on_gpu, strict=True):
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("micro_batch", [0, 4])
    def test_three_steps_and_what_is_resumed_from_them(self, micro_batch: int, tmp_path: Path) -> None:
        config = small(PRECISION="float32", MICRO_BATCH=micro_batch)
        torch.manual_seed(0)
        batches = [synthetic_batch(config, 16) for _ in range(3)]
        on_cpu, on_gpu = (build_trainer(config, device) for device in (CPU, CUDA))
        # Three steps amplify a rounding error ten times, and TF32 has 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            losses = [
                [trainer.step(i, batch).total.item() for i, batch in enumerate(batches)] for trainer in (on_cpu, on_gpu)
            ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
        # A checkpoint goes from the GPU to the CPU, and on it goes.
        state = {
            "format": checkpoint.PRETRAIN,
            "model": on_gpu.network.state_dict(),
            "optimizer": on_gpu.optimizer.state_dict(),
            "position": {"epoch": 0, "step": 3},
        }
        loaded = checkpoint.load(checkpoint.save(tmp_path, state))
        for trainer in (on_cpu, on_gpu):
            trainer.network.load_state_dict(loaded["model"])
            trainer.optimizer.load_state_dict(loaded["optimizer"])
            trainer.criterion.load_state_dict(on_gpu.criterion.state_dict())
        after = [trainer.step(3, batches[0]).total.item() for trainer in (on_cpu, on_gpu)]
        assert after[1] == pytest.approx(after[0], rel=1e-2)

    def test_images_copied_ahead_are_complete_when_they_are_used(self) -> None:
        # The copy of 150 MB takes milliseconds, the sum that must wait for it is asked for at once.
        def read() -> Iterator[Batch]:
            for number in range(5):
                images = torch.full((2, 500, 3, 224, 224), number, dtype=torch.uint8)
                yield Batch(images.pin_memory(), *[torch.zeros(1)] * 3, [])  # type: ignore[arg-type]

        means = [batch.images.float().mean() for batch in copy_ahead(read(), CUDA)]  # type: ignore[arg-type]
        assert [mean.item() for mean in means] == [0, 1, 2, 3, 4]

    def test_images_copied_ahead_give_the_same_losses(self) -> None:
        config = small(PRECISION="float32")
        batches = [synthetic_batch(config, 16).pin_memory() for _ in range(4)]
        losses = []
        for ahead in (False, True):
            trainer = build_trainer(config)
            coming = copy_ahead((batch for batch in batches), CUDA) if ahead else batches
            losses.append([trainer.step(i, batch).total.item() for i, batch in enumerate(coming)])
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    def test_a_bad_batch_leaves_no_trace(self) -> None:
        config = small()
        trainer, batch = build_trainer(config), synthetic_batch(config, 8)
        trainer.step(0, batch)
        before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
        mean, trainer.mean = trainer.mean, trainer.mean * float("nan")
        trainer.step(1, batch)
        assert trainer.flags.tolist() == [1, 0]
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())
        trainer.mean = mean
        assert trainer.step(2, batch).total.isfinite()

    @pytest.mark.parametrize("kernels", [False, True])
    def test_batch_norm_over_processes(self, kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 0 if kernels else 1 << 40)
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
        try:
            x = torch.randn(8, 16, 5, 5, device=CUDA).add_(10).to(memory_format=torch.channels_last)
            for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
                results = []
                for norm in (torch.nn.BatchNorm2d(16), GlobalBatchNorm(16)):
                    values = x.detach().to(dtype, copy=True).requires_grad_()
                    y = norm.to(CUDA)(values)
                    y.float().sin().sum().backward()
                    results.append(
                        [y, values.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
                    )
                for expected, found in zip(*results, strict=True):
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("adds", "relu"), [(False, False), (False, True), (True, True)])
    def test_kernels_of_batch_norm(
        self, dtype: torch.dtype, adds: bool, relu: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 0)
        assert gpu_kernels.can_build(CUDA)
        for shape in ((3, 5, 4, 3), (64, 64, 56, 56), (8, 2048, 7, 7)):
            own, reference = ViewBatchNorm(shape[1]).to(CUDA), torch.nn.BatchNorm2d(shape[1]).to(CUDA, torch.float64)
            torch.nn.init.normal_(own.weight)
            torch.nn.init.normal_(own.bias)
            reference.load_state_dict(own.state_dict())
            values = [torch.randn(shape, device=CUDA, dtype=dtype) for _ in range(3)]
            x, branch, slope = (each.to(memory_format=torch.channels_last) for each in values)
            inputs = [(3 * x + 5).requires_grad_(), branch.requires_grad_()]
            exact = [each.detach().double().requires_grad_() for each in inputs]
            y = own(inputs[0], inputs[1] if adds else None, relu)
            assert y.grad_fn.name() == "_NormalizeBackward"
            expected = reference(exact[0]) + (exact[1] if adds else 0)
            expected = expected.relu() if relu else expected
            y.backward(slope)
            expected.backward(slope.double())
            pairs = [(y, expected), (inputs[0].grad, exact[0].grad), (own.weight.grad, reference.weight.grad)]
            pairs += [(own.bias.grad, reference.bias.grad), *zip(own.buffers(), reference.buffers(), strict=True)]
            pairs += [(inputs[1].grad, exact[1].grad)] if adds else []
            for found, wanted in pairs:
                error = (found.double() - wanted).abs().mean() / wanted.double().abs().mean()
                assert error < (1e-5 if dtype == torch.float32 else 1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kernels_of_max_pooling(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 0)
        for shape in ((2, 5, 4, 3), (16, 64, 112, 112), (3, 200, 9, 6)):
            x = torch.randn(shape, device=CUDA, dtype=dtype).relu().to(memory_format=torch.channels_last)
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            y, expected = MaxPool2d()(inputs[0]), torch.nn.functional.max_pool2d(inputs[1], 3, 2, 1)
            assert y.grad_fn.name() == "_MaxPoolBackward"
            slope = torch.randn_like(expected)
            y.backward(slope)
            expected.backward(slope)
            assert torch.equal(y, expected)
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_graph_computes_the_same_steps(self, precision: str) -> None:
        config = small(PRECISION=precision)
        batches = [synthetic_batch(config, 16).pin_memory() for _ in range(4)]
        losses, weights = [], []
        for graph in (False, True):
            trainer = build_trainer(config)
            if graph:
                capture_step(trainer, 16, config.DATA.IMAGE_SIZE)
            found = [trainer.step(0, batches[0]).total.item()]
            mean, trainer.mean = trainer.mean, trainer.mean * float("nan")
            trainer.step(1, batches[1])  # is skipped
            assert trainer.flags.tolist() == [1, 0]
            trainer.mean = mean
            losses.append(found + [trainer.step(i, batches[i]).total.item() for i in (1, 2, 3)])
            weights.append(trainer.network.state_dict())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "float32" else 1e-2)
        if precision == "float32":  # in bfloat16 the graph adds the gradients of both views in another type
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-3)

    def test_a_run_with_a_graph(self, photos: Path, tmp_path: Path) -> None:
        # Workers and the thread that pins memory start after the capture; the probe uses the encoder in between.
        keys = [*("DATA.ROOT", photos, "DATA.NAME", "folder", "DATA.IMAGE_SIZE", 32, "DATA.WORKERS", 1)]
        keys += [*("TRAIN.BATCH_SIZE", 8, "TRAIN.EPOCHS", 2, "PROJECTOR.DIMS", [16, 8], "PROBE.EVERY", 1, "PROBE.K", 3)]
        keys += ["LOG.PERIOD", 1, "TRAIN.PRECISION", "float32"]
        totals = []
        for choice in ("on", "off"):
            arguments = ["--config", "shapes_R18", "--output", tmp_path / choice, *keys, "TRAIN.CUDA_GRAPH", choice]
            train.main([str(argument) for argument in arguments])
            lines = (tmp_path / choice / "metrics.json").read_text().splitlines()
            totals.append([json.loads(line)["total"] for line in lines if "total" in line])
        assert len(totals[0]) == 6
        assert totals[0] == pytest.approx(totals[1], rel=1e-2)

    def test_neighbours(self) -> None:
        train, labels, test = torch.randn(100, 16), torch.arange(100), torch.randn(9, 16)
        expected, found = (knn.nearest(train, labels, test, k=5, device=device) for device in (CPU, CUDA))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], expected[1])

    def test_the_host_does_not_wait(self) -> None:
        config = small()
        trainer, batch = build_trainer(config), synthetic_batch(config, 8).pin_memory()
        batches = copy_ahead((batch for _ in range(4)), CUDA)
        trainer.step(0, next(batches))
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(1, next(batches))
            trainer.step(2, next(batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")

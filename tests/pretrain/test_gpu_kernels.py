"""The Triton kernels of the encoder, by Triton's interpreter on the CPU, and on a simulated GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from pretrain import gpu_kernels
from pretrain.batches.augment import augment
from pretrain.config import get_defaults
from pretrain.distributed import batch_norm_gpu
from pretrain.distributed.batch_norm import GlobalBatchNorm, ViewBatchNorm, convert
from pretrain.encoder import BasicBlock, Bottleneck, build_encoder
from pretrain.pooling import MaxPool2d
from pretrain.training.dry_run import synthetic_batch
from tests.pretrain.fake_cuda import CUDA, fake_cuda, pinned_batch


def use_interpreter() -> None:
    """Have the operations run on the CPU, and the layers use them."""
    from pretrain import pooling_kernels
    from pretrain.distributed import batch_norm_kernels

    for name in ("statistics", "normalize", "sums", "propagate"):
        gpu_kernels.LIBRARY.impl(f"batch_norm_{name}", getattr(batch_norm_kernels, name), "CPU")
    for name in ("max_pool", "max_pool_backward"):
        gpu_kernels.LIBRARY.impl(name, getattr(pooling_kernels, name), "CPU")
    batch_norm_kernels.TILE = pooling_kernels.TILE = 256  # so that a map takes several programs
    batch_norm_kernels.TILES = 2
    gpu_kernels.should_use = lambda x: x.dim() == 4  # type: ignore[assignment]


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def compare_batch_norm() -> None:
    """With and without what follows, beside float64."""
    use_interpreter()
    torch.manual_seed(0)
    for shape in ((3, 5, 4, 3), (20, 64, 3, 3), (2, 200, 3, 3)):
        for adds, relu in ((False, False), (False, True), (True, False), (True, True)):
            own, reference = ViewBatchNorm(shape[1]), nn.BatchNorm2d(shape[1])
            nn.init.normal_(own.weight)
            nn.init.normal_(own.bias)
            reference.load_state_dict(own.state_dict())
            x, branch, slope = channels_last(*shape) * 2 + 30, channels_last(*shape), channels_last(*shape)
            inputs = [x.requires_grad_(), branch.requires_grad_()]
            exact = [each.detach().double().requires_grad_() for each in inputs]
            y = own(x, branch if adds else None, relu)
            expected = reference.double()(exact[0]) + (exact[1] if adds else 0)
            expected = expected.relu() if relu else expected
            y.backward(slope)
            expected.backward(slope.double())
            found = [y, x.grad, own.weight.grad, own.bias.grad, own.running_mean, own.running_var]
            wanted = [expected, exact[0].grad, reference.weight.grad, reference.bias.grad]
            wanted += [reference.running_mean, reference.running_var]
            if adds:
                found, wanted = [*found, branch.grad], [*wanted, exact[1].grad]
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    for kind in (ViewBatchNorm, GlobalBatchNorm):  # NaN is passed on, so that the step is found to be bad
        if kind is GlobalBatchNorm:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        x = channels_last(2, 4, 3, 3)
        x[0, 0, 0, 0] = torch.nan
        assert kind(4)(x, relu=True)[:, 0].isnan().all()


def compare_max_pool() -> None:
    """Ties, odd and even sides, NaN."""
    use_interpreter()
    torch.manual_seed(0)
    for shape in ((2, 5, 4, 3), (2, 20, 9, 8), (1, 3, 1, 1), (1, 200, 4, 6)):
        x = channels_last(*shape).relu().requires_grad_()
        again = x.detach().clone().requires_grad_()
        y, expected = MaxPool2d()(x), F.max_pool2d(again, 3, 2, 1)
        slope = torch.randn_like(expected)
        y.backward(slope)
        expected.backward(slope)
        assert torch.equal(y, expected)
        torch.testing.assert_close(x.grad, again.grad)
    values = channels_last(1, 1, 4, 4)
    values[0, 0, 1, 1] = torch.nan
    assert torch.equal(MaxPool2d()(values).isnan(), F.max_pool2d(values, 3, 2, 1).isnan())


def compare_blocks() -> None:
    """Residual blocks with the kernels beside torchvision's, over one process and over a group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    use_interpreter()
    torch.manual_seed(0)
    x = channels_last(8, 16, 6, 6)
    for own, reference in ((BasicBlock, resnet.BasicBlock), (Bottleneck, resnet.Bottleneck)):
        width = 16 // own.expansion
        for stride in (1, 2):
            shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
            blocks = [kind(16, width, stride, shortcut if stride == 2 else None) for kind in (reference, own, own)]
            blocks = [copy.deepcopy(block) for block in blocks]  # of which each has a shortcut of its own
            results = []
            for block in blocks[1:]:
                block.load_state_dict(blocks[0].state_dict())
            for block, kind in zip(blocks, (None, ViewBatchNorm, GlobalBatchNorm), strict=True):
                if kind:
                    convert(block, kind)
                values = x.clone().requires_grad_()
                y = block.to(memory_format=torch.channels_last)(values)
                y.sin().sum().backward()
                results.append([y, values.grad, *(each.grad for each in block.parameters()), *block.buffers()])
            for found in results[1:]:
                for one, other in zip(found, results[0], strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def compare_processes() -> None:
    """One of two processes with the same images, of which one may have too few for the kernels: they send the same."""
    use_interpreter()
    torch.manual_seed(0)
    x, branch, slope = (channels_last(4, 20, 3, 3) for _ in range(3))
    results, sent = [], []

    def all_reduce(values: Tensor) -> None:
        sent[-1].append((values.numel(), values.dtype))
        values.mul_(2)

    torch.distributed.all_reduce = all_reduce  # type: ignore[assignment]
    for kernels in (True, False):
        gpu_kernels.should_use = lambda _, kernels=kernels: kernels  # type: ignore[misc]
        norm, inputs = GlobalBatchNorm(20), [each.clone().requires_grad_() for each in (x, branch)]
        sent.append([])
        y = norm(*inputs, relu=True)
        assert (y.grad_fn.name() == "_NormalizeBackward") is kernels
        y.backward(slope)
        results.append([y, *(each.grad for each in [*inputs, *norm.parameters()]), *norm.buffers()])
    assert len(sent[0]) == 2
    assert sent[0] == sent[1]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compare", [compare_batch_norm, compare_max_pool, compare_blocks, compare_processes])
def test_kernels_compute_what_pytorch_computes(compare: "object") -> None:
    pytest.importorskip("triton")
    program = f"from {__name__} import {compare.__name__} as compare; compare()"  # type: ignore[attr-defined]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # must be set before Triton is imported
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment, check=True)


@pytest.mark.parametrize("large", [True, False])
def test_large_maps_take_the_kernels(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 0 if large else 1 << 40)
    called: list[str] = []
    encoder = convert(build_encoder("resnet18", "imagenet"), ViewBatchNorm)

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    with fake_cuda():
        encoder.to(CUDA, memory_format=torch.channels_last)
        images = torch.zeros(2, 3, 64, 64, device=CUDA).to(memory_format=torch.channels_last)
        with Recorded():
            assert encoder(images).shape == (2, 512)
    counts = [called.count(name) for name in ("batch_norm_statistics", "batch_norm_normalize", "max_pool")]
    assert counts == ([20, 20, 1] if large else [0, 0, 0])
    assert (called.count("relu_") + called.count("relu")) == (0 if large else 17)


def test_maps_and_layers_that_the_kernels_do_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 72)
    with fake_cuda():
        maps = torch.zeros(2, 4, 3, 3, device=CUDA).to(memory_format=torch.channels_last)
        assert batch_norm_gpu.should_use(ViewBatchNorm(4), maps)
        for other in (maps.double(), maps.contiguous(), maps[:, :, 0], maps[:1]):
            assert not batch_norm_gpu.should_use(ViewBatchNorm(4), other)
        for settings in ({"dtype": torch.float64}, {"affine": False}, {"momentum": None}):
            assert not batch_norm_gpu.should_use(ViewBatchNorm(4, **settings), maps)
    monkeypatch.setattr(batch_norm_gpu, "should_use", lambda *_: True)
    monkeypatch.setattr(batch_norm_gpu, "normalize", None)
    norm = ViewBatchNorm(4)
    norm.views = 2  # each has statistics of its own
    assert norm(torch.rand(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_a_machine_that_cannot_build_kernels_trains_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Without a C compiler, say. It is told once.
    def fail(x: Tensor) -> None:
        raise RuntimeError("first line\nFailed to find C compiler")

    monkeypatch.setattr("torch.ops.corinfomax.try_kernel", fail)
    monkeypatch.setattr(gpu_kernels, "LEAST_ELEMENTS", 0)
    gpu_kernels.can_build.cache_clear()
    encoder = convert(build_encoder("resnet18", "imagenet"), ViewBatchNorm)
    batch = synthetic_batch(get_defaults(), 2)
    try:
        with fake_cuda():
            pinned = pinned_batch(batch)
            encoder.to(CUDA, memory_format=torch.channels_last)
            for view in range(2):
                images, mean = pinned.images[view].to(CUDA), torch.zeros(3, device=CUDA)
                assert encoder(augment(images, pinned.params[view], mean, mean)).shape == (2, 512)
    finally:
        gpu_kernels.can_build.cache_clear()
    assert len([each for each in caplog.records if "Failed to find C compiler" in each.getMessage()]) == 1

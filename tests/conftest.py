"""Fixtures shared by all tests."""

import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foundation import signals
from foundation.errors import UserError
from foundation.signals import SIGNALS

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
if not torch.cuda.is_available():
    # The first backward pass starts a thread for each GPU, and a process with such threads cannot fork. It comes here,
    # before a test that simulates a GPU.
    torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _no_signal_handler_is_left() -> Iterator[None]:
    """What a test leaves behind would act in the later tests of its process, and in processes that they fork."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.fixture
def as_a_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that call what ends a process: afterwards signals do again what they did before."""
    monkeypatch.setattr(signals, "_exits", False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signal_at_line(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, signal.Signals], None]:
    """Have this process get a signal as soon as a line with a text has been logged."""
    handle = logging.Logger.handle

    def prepare(text: str, number: signal.Signals) -> None:
        def handle_and_signal(self: logging.Logger, record: logging.LogRecord) -> None:
            handle(self, record)
            if text in record.getMessage():
                signal.raise_signal(number)

        monkeypatch.setattr(logging.Logger, "handle", handle_and_signal)

    return prepare


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small JPEGs of mixed sizes with train/ and val/, two classes each: colour ramps and noise."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(("circle", "square")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(24, 60, 2)
                ramp = np.linspace(0, 200, width)[None, :, None] * np.array([1, 0.5, number])
                pixels = ramp + rng.normal(30, 15, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.jpg")
    return root


@pytest.fixture
def error_of() -> Callable[[Callable[[Sequence[str]], None], Sequence[str]], str]:
    """Run an entry point's `main`, expect a `UserError`, and return its message."""

    def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> str:
        with pytest.raises(UserError) as caught:
            main(list(argv))
        return str(caught.value)

    return run


@pytest.fixture
def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def files_up_to() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Have the system refuse to let files grow beyond so many bytes, as a full disk would.

    For the length of a `with` and no longer: pytest's own output may go to a file.
    """

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit

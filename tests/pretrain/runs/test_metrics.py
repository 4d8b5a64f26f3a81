"""The record of a run: lines that survive damage, and what a terminal and log.txt show."""

import fcntl
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from foundation.errors import UserError
from foundation.files import report_disk_errors
from pretrain.runs.metrics import JsonLines, Metrics, Progress, read_metrics, start_logging


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("pretrain", "foundation")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


GOOD = [{"iteration": 0, "total": 1.5}, {"iteration": 4, "total": 1.25}]


@pytest.mark.parametrize(
    "damage", [b"5\n", b"{}\n", b'{"iteration": "x"}\n', b'{"iteration": 3, "to\xff": 1}\n', b"[[\n"]
)
def test_a_damaged_line_is_skipped_with_a_warning(damage: bytes, tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.json"
    lines = [json.dumps(line).encode() + b"\n" for line in GOOD]
    path.write_bytes(lines[0] + damage + lines[1])
    start_logging(None)
    assert read_metrics(path) == GOOD
    assert re.search(rf"{path}: skipped (line 2|1 line without)", capsys.readouterr().out)
    JsonLines(path, first_step=4).close()  # as a resume does
    assert [json.loads(line) for line in path.read_text().splitlines()] == GOOD[:1]


@pytest.mark.parametrize("start", [lambda run: JsonLines(run / "metrics.json", 1), lambda run: Metrics(run, 1)])
def test_a_full_disk_at_the_start_is_one_line(start: Callable, tmp_path: Path, files_up_to: Callable) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(GOOD[0]) + "\n")
    with files_up_to(0), pytest.raises(UserError, match=rf"cannot write {tmp_path}"), report_disk_errors(tmp_path):
        start(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.json") == GOOD[:1]


def test_a_full_disk_during_a_run_is_one_line(tmp_path: Path, files_up_to: Callable, capfd) -> None:
    """TensorBoard's file, which a thread writes, reaches the limit first."""

    def fill(metrics: Metrics) -> None:
        for step in range(1000):
            metrics.write(step, {"a long name of a value that fills TensorBoard's file": 1.0})
            metrics._board.flush()

    metrics = Metrics(tmp_path, 0)
    with files_up_to(10_000), pytest.raises(UserError, match="File too large"), report_disk_errors(tmp_path):
        fill(metrics)
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path, files_up_to: Callable, capsys) -> None:
    start_logging(tmp_path)
    with files_up_to(100):
        for _ in range(5):
            logging.getLogger("pretrain").info("a line of forty characters or thereabouts")
    found = capsys.readouterr()
    assert found.out.count("a line of") == 5
    assert found.err.count(f"cannot write {tmp_path / 'log.txt'}: [Errno 27] File too large") == 1
    assert "Traceback" not in found.err


def test_a_name_that_is_not_unicode_is_escaped_and_the_log_goes_on(tmp_path: Path, capsys) -> None:
    start_logging(tmp_path)
    logging.getLogger("pretrain").info("\udcff.jpg: empty file")
    logging.getLogger("pretrain").info("the next line")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("\\udcff.jpg: empty file")
    assert second.endswith("the next line")


def test_a_terminal_of_80_columns_shows_the_essentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    controlling, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        start_logging(tmp_path)
        progress = Progress(46900, 46897, interval=0)
        progress._bar.mininterval = 0
        for _ in range(3):
            progress.advance("epoch 100 loss 5.123 data 2% 1234 img/s lr 0.2000 big-bang 3.2 attraction 1.2e-03")
        progress.close()
        content = b""
        while b"\n" not in content:  # the end of the bar
            content += os.read(controlling, 10000)
    shown = content.decode()
    assert re.search(r"\r100% 46900/46900 eta \S+ epoch 100 loss 5.123 data 2% 1234 img/s", shown), shown
    assert max(len(part) for part in shown.split("\r")) <= 80
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 3  # on a terminal too
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 4\d{4}/46900  eta 0:00:00  epoch 100 loss", x) for x in log
    )
    assert capsys.readouterr().out == ""


def test_a_signal_while_tqdm_makes_its_lock_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm releases the lock of `external_write_mode` even where it was not made, which raises AttributeError."""

    def stopped() -> None:
        raise SystemExit(75)

    monkeypatch.delattr(tqdm, "_lock", raising=False)
    monkeypatch.setattr("tqdm.std.TqdmDefaultWriteLock", stopped)
    with pytest.raises(SystemExit):
        start_logging(None)  # not later, in the first line of the log

"""A process that fetches the tars that are needed next, while others are read.

It is a program of its own, because its threads must not live in a process that loader workers are forked from. Each
line of its standard input is a JSON list of the tars that are needed from now on, in order. When the input ends,
because the process that started it has ended, it ends too. It saves only time: a tar that it has not fetched is
fetched by the process that needs it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from foundation.errors import UserError
from foundation.signals import SIGNALS
from pretrain.images import remote
from pretrain.images.cache import ShardCache, key_of
from pretrain.images.shards import Shard

CONNECTIONS = 4  # fetches at a time


class Prefetcher:
    """Fetches tars in a process of its own, which is started when it is first needed.

    Args:
        cache: where the tars are kept.
        shards: the tars, by number.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[Shard]) -> None:
        self._cache, self._shards = cache, shards
        self._process: subprocess.Popen[str] | None = None

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these tars, in this order, instead of those of the previous call."""
        if self._process is None:
            if all(self._cache.has(self._shards[number]) for number in numbers):
                return
            self._start()
        self._tell(list(numbers))

    def close(self) -> None:
        """End the process. Unfinished fetches are lost."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pretrain.images.prefetch"],
            stdin=subprocess.PIPE,
            text=True,
            env=remote.environment(),
        )
        cache = {"folder": str(self._cache.folder), "limit": self._cache.limit, "patience": self._cache.patience}
        self._tell({"cache": cache, "shards": [asdict(shard) for shard in self._shards]})

    def _tell(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it was killed; the tars are fetched when they are needed


class Queue:
    """The tars to fetch, shared by the threads that fetch them."""

    def __init__(self, cache: ShardCache, shards: Sequence[Shard]) -> None:
        self._cache, self._shards = cache, shards
        self._wanted: list[int] = []
        self._keep: set[str] = set()
        self._changed = threading.Condition()

    def replace(self, numbers: Sequence[int]) -> None:
        """Fetch these from now on, in this order."""
        for number in numbers:
            self._cache.touch(self._shards[number])
        with self._changed:
            self._wanted, self._keep = list(numbers), {key_of(self._shards[number]) for number in numbers}
            self._changed.notify_all()

    def work(self) -> None:
        """Fetch one tar after the other, without end."""
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard, keep = self._shards[self._wanted.pop(0)], self._keep
            try:
                self._cache.ensure(shard, keep, wait=False)
            except UserError as error:  # the process that needs it tries again, and reports it
                print(f"warning: not fetched in advance: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Fetch what standard input asks for, until it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the process that reads the images handles them
    setup = json.loads(sys.stdin.readline())
    cache = ShardCache(**{**setup["cache"], "folder": Path(setup["cache"]["folder"])})
    queue = Queue(cache, [Shard(**shard) for shard in setup["shards"]])
    for _ in range(CONNECTIONS):
        threading.Thread(target=queue.work, daemon=True).start()
    for line in sys.stdin:
        queue.replace(json.loads(line))
    os._exit(0)  # without waiting for the threads


if __name__ == "__main__":
    main()

"""A process that fetches the tars that will be needed, while others are read.

It is a program of its own, so that no thread of it lives in a process that loader workers are forked from. It is told
on its standard input, a JSON list a line, which tars are needed from here on, in the order of need; when the input
ends, because whoever started it is through or dead, it ends as well. Nothing depends on it but the time: a tar that it
has not fetched is fetched by the process that waits for it.
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
from pretrain.distributed.signals import SIGNALS
from pretrain.images.cache import ShardCache, key_of
from pretrain.images.shards import Shard

CONNECTIONS = 4  # fetches at a time


class Prefetcher:
    """Starts the process at the first need, and speaks to it.

    Args:
        cache: where the tars go.
        shards: the tars, by number.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[Shard]) -> None:
        self._cache, self._shards = cache, shards
        self._process: subprocess.Popen[str] | None = None

    def want(self, numbers: Sequence[int]) -> None:
        """Have these tars fetched, in this order; what was wanted before is not any more."""
        if self._process is None:
            if all(self._cache.has(self._shards[number]) for number in numbers):
                return
            self._start()
        self._tell(list(numbers))

    def close(self) -> None:
        """End the process. What it is fetching is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pretrain.images.prefetch"],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
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
            pass  # it was killed: what it would have fetched is fetched when it is needed


class Queue:
    """The tars to fetch, shared by the threads that do."""

    def __init__(self, cache: ShardCache, shards: Sequence[Shard]) -> None:
        self._cache, self._shards = cache, shards
        self._wanted: list[int] = []
        self._keep: set[str] = set()
        self._changed = threading.Condition()

    def replace(self, numbers: Sequence[int]) -> None:
        """Want these, in this order."""
        for number in numbers:
            self._cache.touch(self._shards[number])
        with self._changed:
            self._wanted, self._keep = list(numbers), {key_of(self._shards[number]) for number in numbers}
            self._changed.notify_all()

    def work(self) -> None:
        """Fetch one after the other, for ever."""
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard, keep = self._shards[self._wanted.pop(0)], self._keep
            try:
                self._cache.ensure(shard, keep, wait=False)
            except UserError as error:  # whoever comes to need it tries again, and says so
                print(f"not fetched ahead: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Fetch what standard input asks for, until it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # those are for whoever reads the images
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

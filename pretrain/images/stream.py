"""Remote tars as a source of images: fetched into a bounded folder, and read there as local tars are."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from foundation.errors import UserError
from pretrain.distributed import group
from pretrain.images.cache import ShardCache
from pretrain.images.fetch import measure, measure_objects, stall_of
from pretrain.images.prefetch import Prefetcher
from pretrain.images.shards import PIPE, WEB, Shard
from pretrain.images.tars import TarIndex, TarSource
from pretrain.runs.metrics import Progress, start_logging

CACHE = Path.home() / ".cache" / "corinfomax" / "shards"
MEASURED_AT_ONCE = 16  # requests for sizes
LEAST = 1024  # bytes of an image in a tar: a header and a block
REREADS = 10  # of a tar that other processes remove before it is opened
logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Streaming:
    """How remote tars are kept.

    Args:
        folder: where they are kept; empty: `CACHE`.
        gigabytes: most that they may take there.
        window: tars among which the images of pretraining are shuffled; 0: all. See `sampler.epoch_order`.
        patience: seconds without data after which a fetch fails.
    """

    folder: str = ""
    gigabytes: float = 100.0
    window: int = 0
    patience: float = 300.0


class StreamedTars(TarSource):
    """The images of remote tars.

    Before the first step the number of images in each tar and its size must be known, and for training with labels the
    labels. What neither an index nor an earlier run says is found here, by fetching each tar once.

    Args:
        shards: the tars.
        streaming: how to keep them.
        root: what names them, for messages.
        labelled: whether labels are used. If not, all images are `UNLABELED`.

    Raises:
        UserError: as `TarSource`; or a tar does not exist or is damaged, or the folder is too small.
    """

    def __init__(self, shards: Sequence[Shard], streaming: Streaming, root: str, labelled: bool) -> None:
        limit = round(streaming.gigabytes * 1e9)
        self.cache = ShardCache(Path(streaming.folder or CACHE), limit, streaming.patience)
        self.places, found = list(shards), [self.cache.known(shard) for shard in shards]
        self._measure([i for i, known in enumerate(found) if known is None])
        for shard in self.places:
            if shard.size is not None and (shard.samples or 0) * LEAST > shard.size:
                raise UserError(
                    f"{shard.url} cannot hold {shard.samples:,} images in {shard.size:,} bytes; correct its index"
                )
        if not labelled:
            self.check_room(streaming.window)
        needed = [None if labelled else shard.samples and shard.size for shard in self.places]
        wanted = [i for i, known in enumerate(found) if known is None and needed[i] is None]
        if wanted:
            self._fetch_indexes(wanted)
            for i in wanted:
                found[i] = self.cache.known(self.places[i])
        for i, known in enumerate(found):
            if known:
                self.places[i] = replace(self.places[i], size=known.size, samples=len(known.images))
        if not labelled:
            self.check_room(streaming.window)
        indexes = [known and known.images for known in found]
        counts = [shard.samples or 0 for shard in self.places]
        super().__init__([shard.url for shard in shards], indexes, counts, root, labelled)

    def check_room(self, window: int) -> None:
        """Refuse a folder that cannot hold the tars of two windows: those being read, and the next ones.

        Tars whose size is not known yet are not counted.

        Raises:
            UserError: naming what to change.
        """
        sizes = sorted((shard.size or 0 for shard in self.places), reverse=True)
        needed, limit = sum(sizes[: 2 * window] if 0 < window < len(sizes) else sizes), self.cache.limit
        if needed <= limit:
            return
        fitting = next((n for n in range(len(sizes) // 2, 0, -1) if sum(sizes[: 2 * n]) <= limit), 0)
        advice = (
            f"or shuffle among fewer tars at a time: DATA.WINDOW {fitting}" if fitting else "no DATA.WINDOW fits it"
        )
        raise UserError(
            f"DATA.CACHE_GB is {limit / 1e9:g}, but the tars needed at a time have {needed / 1e9:.3g} GB "
            f"(DATA.WINDOW {window} of {len(sizes)} tars); raise it, {advice}"
        )

    def _measure(self, numbers: Sequence[int]) -> None:
        """Ask the servers for the sizes that are not known."""
        asked = [i for i in numbers if self.places[i].size is None and not self.places[i].url.startswith(PIPE)]
        stall = stall_of(self.cache.patience)
        stored = [i for i in asked if not self.places[i].url.startswith(WEB)]
        if stored:
            sizes = measure_objects([self.places[i].url for i in stored], stall)
            for i, size in zip(stored, sizes, strict=True):
                self.places[i] = replace(self.places[i], size=size)
        web = [i for i in asked if self.places[i].url.startswith(WEB)]
        pool = ThreadPoolExecutor(MEASURED_AT_ONCE)
        try:
            for i, size in zip(web, pool.map(lambda i: measure(self.places[i].url, stall), web), strict=True):
                self.places[i] = replace(self.places[i], size=size)
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch_indexes(self, wanted: Sequence[int]) -> None:
        """Fetch tars to index them."""
        if not logger.handlers and group.is_main():
            start_logging(None)  # no run is open yet
            logger.setLevel(logging.INFO)
        logger.info("fetching %d of %d tars to index them, once", len(wanted), len(self.places))
        progress = Progress(len(wanted), unit="tar", shown=group.is_main())
        ahead = Prefetcher(self.cache, self.places)
        try:
            ahead.want(wanted)
            for i in wanted:
                self.cache.ensure_known(self.places[i])
                progress.advance(self.places[i].url)
        finally:
            ahead.close()
            progress.close()

    def _index(self, shard: int) -> TarIndex:
        known = self._indexes[shard]
        if known is None:
            self.cache.ensure(self.places[shard])
            record = self.cache.known(self.places[shard])
            assert record is not None
            known = self._indexes[shard] = record.images
        return known

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        for _ in range(REREADS):
            path = self.cache.ensure(self.places[shard])
            try:
                file = os.open(path, os.O_RDONLY)  # for each image, so that a removed tar frees its space
            except FileNotFoundError:
                continue
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        raise UserError(
            f"{path} is removed as soon as it is fetched; do other runs use {path.parent}? Raise DATA.CACHE_GB"
        )

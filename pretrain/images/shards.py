"""Which tars a dataset is made of, where DATA.ROOT is no folder.

    https://host/train-{000000..000146}.tar               ranges of numbers, and alternatives {a,b}, in braces
    pipe:aws s3 cp s3://bucket/train-{000..146}.tar -     what a command writes, run by the shell
    https://host/train.json, /path/to/train.json          an index, as WebDataset's `widsindex` writes it

An index holds {"shardlist": [{"url": ..., "nsamples": ..., "filesize": ..., "md5sum": ...}, ...]}: all but the URL may
be left out, and a URL is taken from the index's own place (or from its "base_path") on. `{split}`, anywhere in
DATA.ROOT, stands for `train` or `val`.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from foundation.errors import UserError
from pretrain.images.fetch import read_text

PIPE = "pipe:"
WEB = ("http://", "https://")
SPLIT = "{split}"
MAX_SHARDS = 1_000_000
BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<list>[^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class Shard:
    """A tar, and what is known of it before it is here: None where it is not."""

    url: str  # or a path
    size: int | None = None  # bytes
    samples: int | None = None  # images
    md5: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a file on this machine."""
        return not self.url.startswith((PIPE, *WEB))


def is_listing(root: str) -> bool:
    """Whether a DATA.ROOT names tars one by one, and not a folder of them."""
    return root.startswith(PIPE) or "://" in root or root.endswith((".json", ".tar"))


def list_shards(root: str, split: str, stall: float) -> Sequence[Shard]:
    """The tars that a DATA.ROOT names.

    Args:
        root: for which `is_listing` is true.
        split: `pretrain`, `train` or `val`.
        stall: seconds without a byte after which a connection is given up.

    Raises:
        UserError: an index cannot be read, or what is named is no uncompressed tar that can be fetched.
    """
    if SPLIT in root:
        root = root.replace(SPLIT, "val" if split == "val" else "train")
    elif split != "pretrain":
        raise UserError(
            f"DATA.ROOT {root} names the tars of one split only; write {SPLIT} in it where the name has train or val"
        )
    shards = [shard for found in _named(root, stall) for shard in _each(found)]
    repeated = len(shards) - len({shard.url for shard in shards})
    if not shards or repeated:
        raise UserError(f"DATA.ROOT {root} names " + (f"{repeated} tars twice" if repeated else "no tar"))
    for shard in shards:
        _check(shard)
    if len({shard.is_local for shard in shards}) > 1:
        raise UserError(f"DATA.ROOT {root} names tars of this machine beside others; fetch all or none of them")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """A pattern's names, the last brace counting fastest: a{0..1}{x,y} -> a0x, a0y, a1x, a1y. Zeros pad, as in bash."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    if found["list"] is not None:
        choices = found["list"].split(",")
    else:
        first, last = found["first"], found["last"]
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise UserError(f"{found[0]} in {pattern} does not go from a number up to a larger one")
        padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    rest = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + choice + tail for choice, tail in itertools.product(choices, rest)]


def _named(root: str, stall: float) -> Sequence[Shard]:
    """What `root` lists, with the braces still in it."""
    if root.startswith(PIPE) or not root.partition("?")[0].endswith(".json"):
        return [Shard(root)]
    try:
        content = read_text(root, stall) if root.startswith(WEB) else Path(root).read_text()
        index = json.loads(content)
        base = index.get("base_path", root)
        return [_entry(entry, root, base) for entry in index["shardlist"]]
    except OSError as error:
        raise UserError(f"the index {root} cannot be read: {error.strerror or error}; check DATA.ROOT") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{root} is no index of tars, {{"shardlist": [{{"url": ..., "nsamples": ...}}, ...]}}: '
            f"{type(error).__name__} {error}"
        ) from error


def _entry(entry: dict[str, Any], index: str, base: str) -> Shard:
    """A line of an index. One that was fetched says what else to fetch, and must not say what to run or read here."""
    url = entry["url"]
    if index.startswith(WEB):
        url = urljoin(urljoin(index, base), url)
        if not url.startswith(WEB):
            raise UserError(f"the index {index} names {url}, but an index from elsewhere may only name http(s) URLs")
    elif base.startswith(WEB):
        url = urljoin(base, url)
    elif Shard(url).is_local and "://" not in url:
        url = str((Path(base) if base != index else Path(index).parent) / url)
    size, samples = (None if entry.get(key) is None else int(entry[key]) for key in ("filesize", "nsamples"))
    return Shard(url, size, samples, str(entry.get("md5sum") or ""))


def _each(shard: Shard) -> Sequence[Shard]:
    """The tars of a name with braces. What is known of one tar cannot be said of several."""
    urls = expand_braces(shard.url)
    return [shard] if urls == [shard.url] else [Shard(url) for url in urls]


def _check(shard: Shard) -> None:
    """Refuse what cannot be fetched or read."""
    scheme, found, _ = shard.url.partition("://")
    if found and shard.is_local:
        raise UserError(
            f"{shard.url}: {scheme}:// is not fetched by this project; name a command that writes the tar to its "
            f"output, as in DATA.ROOT 'pipe:aws s3 cp {shard.url} -'"
        )
    if shard.url.partition("?")[0].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise UserError(f"{shard.url} is compressed; images are read at their place in uncompressed tars")
    if shard.is_local and not Path(shard.url).is_file():
        raise UserError(f"{shard.url} does not exist; check DATA.ROOT")

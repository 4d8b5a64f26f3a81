"""The list of tars of a dataset whose DATA.ROOT is not a folder.

    https://host/train-{000000..000146}.tar               ranges of numbers, and alternatives {a,b}, in braces
    s3://bucket/train-{000..146}.tar, gs://bucket/...     object stores, with the extra `remote` (`remote.py`)
    pipe:ssh host cat train-{000..146}.tar                what a command writes, run by the shell
    https://host/train.json, /path/to/train.json          an index, as WebDataset's `widsindex` writes it

An index holds {"shardlist": [{"url": ..., "nsamples": ..., "filesize": ..., "md5sum": ...}, ...]}. Everything but the
URL may be left out. A URL is relative to the index (or to its "base_path"). An index is data: it cannot name commands.
`{split}`, anywhere in DATA.ROOT, stands for `train` or `val`.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from foundation.errors import UserError
from foundation.json_files import parse_json, read_json
from foundation.names import counted
from pretrain.images.fetch import read_url

PIPE = "pipe:"
WEB = ("http://", "https://")
OBJECT_STORES = ("s3://", "gs://", "gcs://")
SPLIT = "{split}"
MAX_SHARDS = 1_000_000
MAX_INDEX = 256 * 1024**2  # bytes: 250 for each of `MAX_SHARDS` tars
MAX_SAMPLES = 100_000_000  # in a tar; each takes 1 kB or more
MAX_SIZE = 1 << 50  # bytes of a tar
BRACES = re.compile(r"\{(?:(?P<first>\d{1,18})\.\.(?P<last>\d{1,18})|(?P<list>[^{}]*,[^{}]*))\}")


@dataclass(frozen=True)
class Shard:
    """A tar, and what is known of it before it is fetched; None: not known."""

    url: str  # or a path
    size: int | None = None  # bytes
    samples: int | None = None  # images
    md5: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a file on this machine."""
        return not self.url.startswith((PIPE, *WEB, *OBJECT_STORES))


def is_listing(root: str) -> bool:
    """Whether a DATA.ROOT names tars one by one, instead of a folder of them."""
    return root.startswith(PIPE) or "://" in root or root.endswith((".json", ".tar"))


def list_shards(root: str, split: str, stall: float) -> Sequence[Shard]:
    """The tars that a DATA.ROOT names.

    Args:
        root: for which `is_listing` is true.
        split: `pretrain`, `train` or `val`.
        stall: seconds without a byte after which a connection is closed.

    Raises:
        UserError: an index cannot be read, or what it names is not an uncompressed tar that can be fetched.
    """
    if SPLIT in root:
        root = root.replace(SPLIT, "val" if split == "val" else "train")
    elif split != "pretrain":
        raise UserError(
            f"DATA.ROOT {root} names the tars of one split only; write {SPLIT} in it where the name has train or val"
        )
    named = _named(root, stall)
    if sum(count_expansions(found.url) for found in named) > MAX_SHARDS:
        raise UserError(f"DATA.ROOT {root} names more than {MAX_SHARDS:,} tars; check its braces and its index")
    shards = [shard for found in named for shard in _each(found)]
    repeated = len(shards) - len({shard.url for shard in shards})
    if not shards or repeated:
        raise UserError(f"DATA.ROOT {root} names " + (f"{counted(repeated, 'tar')} twice" if repeated else "no tar"))
    for shard in shards:
        if shard.url.startswith(PIPE) and not root.startswith(PIPE):  # what braces in an index expand to counts, too
            raise UserError(
                f"the index {root} names a command, {shard.url}; an index is data and cannot run commands: write the "
                "command into DATA.ROOT itself, with braces for the numbers"
            )
        _check(shard)
    if len({shard.is_local for shard in shards}) > 1:
        raise UserError(f"DATA.ROOT {root} names local tars beside remote ones; fetch all of them or none")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """A pattern's names; the last brace varies fastest: a{0..1}{x,y} -> a0x, a0y, a1x, a1y. Zeros pad, as in bash.

    Raises:
        UserError: a range does not go upwards, or there are more than `MAX_SHARDS` names.
    """
    if count_expansions(pattern) > MAX_SHARDS:
        raise UserError(f"{pattern} stands for more than {MAX_SHARDS:,} names; check its braces")
    parts: list[Sequence[str]] = []
    end = 0
    for found in BRACES.finditer(pattern):
        parts += [(pattern[end : found.start()],), _choices(found)]
        end = found.end()
    return ["".join(chosen) for chosen in itertools.product(*parts, (pattern[end:],))]


def count_expansions(pattern: str) -> int:
    """The number of names that a pattern stands for. Raises UserError for a range that does not go upwards."""
    return math.prod(_count(found, pattern) for found in BRACES.finditer(pattern))


def _count(found: re.Match[str], pattern: str) -> int:
    if found["list"] is not None:
        return found["list"].count(",") + 1
    if int(found["last"]) < int(found["first"]):
        raise UserError(f"{found[0]} in {pattern} does not go from a number up to a larger one")
    return int(found["last"]) - int(found["first"]) + 1


def _choices(found: re.Match[str]) -> Sequence[str]:
    if found["list"] is not None:
        return found["list"].split(",")
    first, last = found["first"], found["last"]
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _named(root: str, stall: float) -> Sequence[Shard]:
    """What `root` lists, with the braces still in it."""
    if root.startswith((PIPE, *OBJECT_STORES)) or not root.partition("?")[0].endswith(".json"):
        return [Shard(root)]
    if root.startswith(WEB):
        index = parse_json(read_url(root, stall, MAX_INDEX), root)
    else:
        index = read_json(Path(root), MAX_INDEX)
    lines = index.get("shardlist") if isinstance(index, dict) else None
    base = index.get("base_path", root) if isinstance(index, dict) else root
    if not isinstance(lines, list) or not isinstance(base, str):
        raise UserError(
            f'{root} is not an index of tars, {{"shardlist": [{{"url": ..., "nsamples": ...}}, ...]}}; of images in a '
            "folder, give the folder"
        )
    return [_entry(line, number, root, base) for number, line in enumerate(lines)]


def _entry(line: Any, number: int, index: str, base: str) -> Shard:
    """An entry of an index. A remote index names what else to fetch, and must not name what to run or read here."""
    url = line.get("url") if isinstance(line, dict) else None
    if not isinstance(url, str) or not url or not url.isprintable():
        raise UserError(f"{index}: shardlist[{number}] has no url, so it is not an index of tars")
    if index.startswith(WEB):
        url = _join(_join(index, base), url)
        if not url.startswith(WEB):
            raise UserError(f"the index {index} names {url}, but a remote index may name only http(s) URLs")
    elif base.startswith(WEB):
        url = _join(base, url)
    elif Shard(url).is_local and "://" not in url:
        url = str((Path(base) if base != index else Path(index).parent) / url)
    md5 = line.get("md5sum") or ""
    if not isinstance(md5, str):
        raise UserError(f"{index}: shardlist[{number}].md5sum is not text")
    size, samples = (
        _whole_number(line.get(key), f"{index}: shardlist[{number}].{key}", most)
        for key, most in (("filesize", MAX_SIZE), ("nsamples", MAX_SAMPLES))
    )
    return Shard(url, size, samples, md5)


def _join(base: str, url: str) -> str:
    """A URL relative to a base. Raises UserError where it is not a URL."""
    try:
        return urljoin(base, url)
    except ValueError as error:
        raise UserError(f"{url[:99]!r} is not a URL: {error}; check the index of DATA.ROOT") from error


def _whole_number(value: Any, name: str, most: int) -> int | None:
    """A count from an index; None stays None. Raises UserError for anything but a whole number from 0 to `most`."""
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= most:
        raise UserError(f"{name} must be a whole number from 0 to {most:,}, not {str(value)[:30]}")
    return value


def _each(shard: Shard) -> Sequence[Shard]:
    """The tars of a name with braces. What an index says of one tar cannot be said of several."""
    if shard.is_local and Path(shard.url).is_file():  # a file whose own name has braces
        return [shard]
    urls = expand_braces(shard.url)
    return [shard] if urls == [shard.url] else [Shard(url) for url in urls]


def _check(shard: Shard) -> None:
    """Refuse what cannot be fetched or read."""
    scheme, found, _ = shard.url.partition("://")
    if found and shard.is_local:
        raise UserError(
            f"{shard.url}: {scheme}:// cannot be fetched; use http(s), s3 or gs, or a command that writes the tar to "
            "its output: DATA.ROOT 'pipe:COMMAND'"
        )
    if shard.url.partition("?")[0].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise UserError(f"{shard.url} is compressed; images are read at their offsets in uncompressed tars")
    if shard.is_local and not Path(shard.url).is_file():
        raise UserError(f"{shard.url} does not exist or is not a file; check DATA.ROOT")

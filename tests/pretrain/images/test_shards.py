"""DATA.ROOT that names tars: patterns, indexes, and what is refused."""

import json
from pathlib import Path

import pytest

from foundation.errors import UserError
from pretrain.images.shards import Shard, expand_braces, list_shards


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("t-{08..11}.tar", ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]),
        ("t-{8..11}.tar", ["t-8.tar", "t-9.tar", "t-10.tar", "t-11.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("pipe:cat ${HOME}/{3..3}.tar", ["pipe:cat ${HOME}/3.tar"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_an_index_gives_urls_from_its_own_place_on(tmp_path: Path, site) -> None:
    (tmp_path / "a.tar").touch()
    lines = [{"url": "a.tar", "nsamples": 3, "filesize": 9, "md5sum": "0f"}]
    for name, index in (("here", {}), ("base", {"base_path": str(tmp_path)})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"shardlist": lines, **index}))
        assert list_shards(f"{tmp_path}/{name}.json", "pretrain", 1) == [Shard(f"{tmp_path}/a.tar", 9, 3, "0f")]
    lines = [{"url": "x/b-{0..1}.tar", "nsamples": 3}, {"url": "/c.tar"}]
    site.files["/sets/train.json"] = json.dumps({"shardlist": lines}).encode()
    names = [f"{site.url}/{name}" for name in ("sets/x/b-0.tar", "sets/x/b-1.tar", "c.tar")]
    assert list_shards(f"{site.url}/sets/{{split}}.json", "train", 1) == [Shard(name) for name in names]
    (tmp_path / "far.json").write_text(json.dumps({"shardlist": [{"url": "b.tar"}], "base_path": "https://h/d/"}))
    assert list_shards(f"{tmp_path}/far.json", "pretrain", 1) == [Shard("https://h/d/b.tar")]


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("ftp://host/a.tar", "ftp:// cannot be fetched; use http.*pipe:COMMAND"),
        ("https://host/{0..99999}{0..99999}.tar", "names more than 1,000,000 tars; check its braces"),
        ("https://host/" + "{0,1}" * 40 + ".tar", "names more than 1,000,000 tars; check its braces"),
        ("https://host/a.tar.gz", "is compressed"),
        ("https://host/{5..3}.tar", r"\{5..3\} in .* does not go from a number up"),
        ("https://host/{0..1}{0,00,1}.tar", None),
        ("https://host/{a,a}.tar", "names 1 tar twice"),
        ("/no/such/a.tar", "/no/such/a.tar does not exist"),
        ("/no/such.json", "/no/such.json cannot be read: No such file"),
    ],
)
def test_wrong_roots_are_refused(root: str, words: str | None) -> None:
    if words is None:
        assert len(list_shards(root, "pretrain", 1)) == 6
        return
    with pytest.raises(UserError, match=words):
        list_shards(root, "pretrain", 1)


def test_splits_must_be_told_apart() -> None:
    root = "https://host/{split}-{0..1}.tar"
    assert [shard.url for shard in list_shards(root, "val", 1)] == ["https://host/val-0.tar", "https://host/val-1.tar"]
    assert list_shards(root, "pretrain", 1) == list_shards(root, "train", 1)
    with pytest.raises(UserError, match=r"names the tars of one split only; write \{split\}"):
        list_shards("https://host/train-{0..1}.tar", "val", 1)


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": []}', '{"shardlist": [{}]}', '{"shardlist": 3}'])
def test_what_is_no_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(UserError, match=r"i.json( is damaged|.* not an index of tars)"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)


@pytest.mark.parametrize("url", ["pipe:touch ran", "file:///etc/passwd", "s3://bucket/a.tar"])
def test_a_remote_index_names_only_urls(url: str, site) -> None:
    site.files["/i.json"] = json.dumps({"shardlist": [{"url": url}]}).encode()
    with pytest.raises(UserError, match="may name only http"):
        list_shards(f"{site.url}/i.json", "pretrain", 1)


def test_local_and_remote_tars_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": [{"url": "a.tar"}, {"url": "https://host/b.tar"}]}))
    with pytest.raises(UserError, match="local tars beside remote ones"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)


def test_a_local_index_cannot_run_commands(tmp_path: Path) -> None:
    """It may have been downloaded by hand. DATA.ROOT itself may name a command."""
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": [{"url": f"pipe:touch {tmp_path}/ran"}]}))
    with pytest.raises(UserError, match=r"i.json names a command, pipe:touch .*write the command into DATA.ROOT"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": [{"url": "x"}], "base_path": "pipe:touch "}))
    with pytest.raises(UserError, match="names a command"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)
    for braces, base in [("{pipe:id #,pipe:true #}://", {}), ("{pipe:id,pipe:true}", {"base_path": ""})]:
        (tmp_path / "i.json").write_text(json.dumps({"shardlist": [{"url": braces + ".tar"}], **base}))
        with pytest.raises(UserError, match="names a command, pipe:id"):
            list_shards(f"{tmp_path}/i.json", "pretrain", 1)
    assert list_shards("pipe:cat x-{0..1}.tar", "pretrain", 1) == [Shard("pipe:cat x-0.tar"), Shard("pipe:cat x-1.tar")]


@pytest.mark.parametrize(
    "line",
    [
        *(f'{{"url": "https://h/a.tar", "nsamples": {n}}}' for n in ("1e13", "-10", "Infinity", "4.5", "[]", '"x"')),
        *(f'{{"url": "https://h/a.tar", "filesize": {n}}}' for n in ("1e30", "-1", "NaN", "true")),
        '{"url": 5}',
        '{"url": ""}',
        '{"url": "a\\u0000b"}',
        "5",
        '{"url": "https://h/a.tar", "md5sum": [1]}',
    ],
)
def test_values_of_an_index_are_checked(line: str, tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(f'{{"shardlist": [{line}]}}')
    with pytest.raises(UserError, match=r"i.json: shardlist\[0\]"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)


def test_deep_and_long_indexes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"i.json is not usable JSON: it is nested more than"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)
    lines = [{"url": f"https://h/{i}-{{0..99999}}.tar"} for i in range(20)]
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": lines}))
    with pytest.raises(UserError, match="names more than 1,000,000 tars"):
        list_shards(f"{tmp_path}/i.json", "pretrain", 1)

"""Tar archives: samples by number without unpacking; what is hostile or damaged is told, row by row where rows can be told."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest

from embedjax import config
from embedjax.config.errors import DataError
from embedjax.data import tar_index
from embedjax.data.sources import BadRow, manifest, open_source


def archive(path, members):
    """Members: (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            out.addfile(info, io.BytesIO(member[1]))
    return path


def sample(n, picture="jpg"):
    return [
        (f"part/{n:04}.{picture}", bytes([n]) * (700 + n)),
        (f"part/{n:04}.txt", f"caption {n} é\n".encode()),
        (f"part/{n:04}.json", json.dumps({"n": n, "tags": ["a", "b"]}).encode()),
    ]


def row(n):
    return {
        "key": f"part/{n:04}",
        "image": bytes([n]) * (700 + n),
        "txt": f"caption {n} é",
        "json.n": n,
        "json.tags": ["a", "b"],
    }


def opened(path):
    return open_source(config.Tar(str(path)))


def test_samples_by_number(tmp_path):
    for part in range(3):
        rows = [sample(n, ("jpg", "png", "webp")[n % 3]) for n in range(10 * part, 10 * part + 10)]
        archive(tmp_path / f"train-{part:02}.tar", [member for one in rows for member in one])
    for path in (tmp_path, tmp_path / "train-*.tar", tmp_path / "train-{00..02}.tar"):
        source = opened(path)
        assert len(source) == 30 and set(source.columns) == row(0).keys()
        for n in np.random.default_rng(0).permutation(30):
            assert source[n] == row(n)
        assert source.where(17) == (str(tmp_path / "train-01.tar"), 8)
    assert [(f["rows"], f["bytes"]) for f in manifest(source)] == [(10, os.path.getsize(tmp_path / "train-00.tar"))] * 3


def test_a_missing_part_of_a_sample_is_a_missing_value(tmp_path):
    source = opened(archive(tmp_path / "a.tar", [*sample(0), *sample(1)[1:]]))
    assert "image" in source[0] and "image" not in source[1] and len(source) == 2


def special(name, kind, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


HOSTILE = {
    "parent folder": ([("../../evil.jpg", b"x")], "leaves the archive"),
    "parent folder inside": ([("a/../../evil.jpg", b"x")], "leaves the archive"),
    "absolute name": ([("/etc/evil.jpg", b"x")], "leaves the archive"),
    "backslashes": ([("..\\evil.jpg", b"x")], "leaves the archive"),
    "drive letter": ([("C:\\evil.jpg", b"x")], "leaves the archive"),
    "symbolic link": ([special("evil.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")], "no plain file"),
    "link to a member": ([("a.jpg", b"x"), special("evil.jpg", tarfile.LNKTYPE, linkname="a.jpg")], "no plain file"),
    "link outside": ([special("evil.jpg", tarfile.LNKTYPE, linkname="../../etc/passwd")], "no plain file"),
    "character device": ([special("evil.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5)], "no plain file"),
    "block device": ([special("evil.jpg", tarfile.BLKTYPE, devmajor=8)], "no plain file"),
    "pipe": ([special("evil.jpg", tarfile.FIFOTYPE)], "no plain file"),
    "contiguous file": ([special("evil.jpg", tarfile.CONTTYPE)], None),
    "same member twice": ([("evil.jpg", b"x"), ("evil.jpg", b"y")], "two members"),
    "two pictures": ([("evil.jpg", b"x"), ("evil.png", b"y")], "two members"),
    "name again later": ([("evil.jpg", b"x"), ("a.jpg", b"y"), ("evil.txt", b"z")], "stands in the archive before"),
    "text that is not UTF-8": ([("evil.txt", b"\xff\xfe")], "not UTF-8"),
    "json that is not": ([("evil.json", b"{")], "malformed JSON"),
    "deep json": ([("evil.json", b"[" * 100_000)], "JSON"),
    "list for json": ([("evil.json", b"[1]")], "expected an object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_bad_rows_and_write_nothing(case, tmp_path, monkeypatch):
    members, reason = HOSTILE[case]
    (tmp_path / "cwd").mkdir()
    path = archive(tmp_path / "a.tar", [*sample(0), *members, *sample(1)])
    monkeypatch.chdir(tmp_path / "cwd")
    before = sorted(tmp_path.rglob("*"))
    source = opened(path)
    told = {}
    for n in range(len(source)):
        try:
            source[n]
        except BadRow as error:
            told[n] = error.reason
    assert source[0] == row(0) and source[len(source) - 1] == row(1)
    assert (len(told) == 1 and reason in next(iter(told.values()))) if reason else not told
    assert sorted(tmp_path.rglob("*")) == before


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_member_that_claims_more_than_there_is(tmp_path):
    path = archive(tmp_path / "a.tar", sample(0))
    whole = path.read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    (tmp_path / "b.tar").write_bytes(whole + header("bomb.jpg", 1 << 40) + b"x" * 512)
    with pytest.raises(DataError, match=r"b.tar: not a whole tar archive|beyond the archive's end") as error:
        source = opened(tmp_path / "b.tar")
        assert source[0] == row(0)
        source[1]
    assert "\n" not in str(error.value)


def test_a_member_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "LARGEST_MEMBER", 600)
    source = opened(archive(tmp_path / "a.tar", [*sample(0), ("small.txt", b"x")]))
    with pytest.raises(BadRow, match="at most 600 are read"):
        source[0]
    assert source[1] == {"key": "small", "txt": "x"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a whole tar archive|without files"),
        (b"x" * 2000, "not a whole tar archive"),
        (b"\0" * 10240, "without files"),
    ],
)
def test_what_is_no_archive(data, reason, tmp_path):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=reason):
        opened(tmp_path / "a.tar")


def test_a_cut_archive_is_told_or_its_last_sample_is(tmp_path):
    whole = archive(tmp_path / "a.tar", [m for n in range(5) for m in sample(n)]).read_bytes()
    used = len(whole.rstrip(b"\0"))
    for end in range(700, used, 977):
        (tmp_path / "b.tar").write_bytes(whole[:end])
        try:
            source = opened(tmp_path / "b.tar")
        except DataError as error:
            assert "b.tar" in str(error)
            continue
        good = 0
        for n in range(len(source)):
            try:
                found = source[n]
            except BadRow:
                continue
            assert all(found[key] == row(n)[key] for key in found)
            good += 1
        assert good >= len(source) - 1


def test_a_compressed_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match="compressed"):
        opened(archive(tmp_path / "a.tar.gz", sample(0)))
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "train-{00..01}.tar")


def test_a_folder_of_pictures(tmp_path):
    for name in ("cat/b.jpg", "cat/a.PNG", "dog/deep/c.webp", "top.gif", "cat/notes.txt", "cat/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(config.Pictures(str(tmp_path)))
    rows = [source[n] for n in range(len(source))]
    assert [(r["name"], r["label"]) for r in rows] == [("a", "cat"), ("b", "cat"), ("c", "deep"), ("top", tmp_path.name)]
    assert [pathlib.Path(str(r["image"])).read_bytes() for r in rows] == [
        b"cat/a.PNG",
        b"cat/b.jpg",
        b"dog/deep/c.webp",
        b"top.gif",
    ]
    before = manifest(source)
    assert before[0]["rows"] == 4 and before[0]["bytes"] == sum(
        map(len, ["cat/b.jpg", "cat/a.PNG", "dog/deep/c.webp", "top.gif"])
    )
    (tmp_path / "cat" / "b.jpg").write_bytes(b"another size")
    assert manifest(open_source(config.Pictures(str(tmp_path)))) != before
    with pytest.raises(IndexError):
        source[4]
    for path, reason in ((tmp_path / "none", "no such folder"), (tmp_path / "dog" / "empty", "without pictures")):
        (tmp_path / "dog" / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=reason):
            open_source(config.Pictures(str(path)))

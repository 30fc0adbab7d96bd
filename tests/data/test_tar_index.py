"""The index of an archive: kept while the archive is what it was, made by several processes, small."""

import dataclasses
import io
import os
import tarfile

import numpy as np
import pytest

from embedjax import config
from embedjax.config.errors import DataError
from embedjax.data import tar_index
from embedjax.data.sources import manifest, open_source
from embedjax.data.tar_index import TarIndex, read_headers, tar_indexes


def archive(path, count, text=b"a caption"):
    with tarfile.open(path, "w") as out:
        for n in range(count):
            for kind, data in (("jpg", bytes([n % 256]) * 40), ("txt", text)):
                info = tarfile.TarInfo(f"{path.stem}/é{n:05}.{kind}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        out.addfile(tarfile.TarInfo("../last.txt"))
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "LEAST_KEPT", 5)
    return tmp_path / "cache" / "embedjax" / "shards"


def same(a, b):
    for field in dataclasses.fields(TarIndex):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


def read(*paths):
    raise AssertionError(f"{paths} were read again")


def test_an_index_is_kept_until_its_archive_changes(cache, tmp_path, monkeypatch):
    paths = [archive(tmp_path / "a.tar", 20), archive(tmp_path / "b.tar", 3), archive(tmp_path / "c.tar", 7)]
    made = tar_indexes(paths)
    assert len(made[0]) == 21 and made[0][20].fault.endswith("leaves the archive") and not made[0][19].fault
    assert made[0][19].key == "a/é00019" and set(made[0][19].members) == {"jpg", "txt"}
    assert len(list(cache.iterdir())) == 2  # b.tar is small
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "read_headers", lambda path: read_headers(path) if path == paths[1] else read(path))
        for one, other in zip(made, tar_indexes(paths), strict=True):
            same(one, other)
    archive(tmp_path / "a.tar", 8)
    os.utime(paths[0], ns=(1, 1))  # whatever the clock's steps
    assert [len(index) for index in tar_indexes(paths)] == [9, 4, 8]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_index_is_made_again(damage, cache, tmp_path):
    path = archive(tmp_path / "a.tar", 20)
    (made,) = tar_indexes([path])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    same(made, *tar_indexes([path]))
    same(made, *tar_indexes([path]))


def test_many_archives_are_read_by_several_processes(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "LEAST_SHARED", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    paths = [archive(tmp_path / f"{n}.tar", n + 1) for n in range(6)]
    found = tar_indexes(paths)
    monkeypatch.setattr(tar_index, "LEAST_SHARED", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for one, other in zip(found, tar_indexes(paths), strict=True):
        same(one, other)
    (tmp_path / "4.tar").write_bytes(b"x" * 2000)
    monkeypatch.setattr(tar_index, "LEAST_SHARED", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    with pytest.raises(DataError, match=r"4.tar: not a whole tar archive"):
        tar_indexes(paths)


def test_a_cache_that_cannot_be_written_is_told(cache, tmp_path, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert len(*tar_indexes([archive(tmp_path / "a.tar", 20)])) == 21
    assert "cannot keep the index" in caplog.text


def test_an_index_takes_70_bytes_a_sample(tmp_path):
    index = read_headers(archive(tmp_path / "a.tar", 300))
    assert sum(array.nbytes for array in index._arrays().values()) <= 70 * len(index)


def test_the_hash_of_an_archive_is_of_its_names_and_sizes(cache, tmp_path):
    sources = []
    for text in (b"a caption", b"a capTion", b"a longer caption"):
        archive(tmp_path / "a.tar", 20, text)
        sources.append(open_source(config.Tar(str(tmp_path / "a.tar"))))
        os.utime(tmp_path / "a.tar", ns=(len(sources), 1))
    hashes = [manifest(source)[0]["sha256"] for source in sources]
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_kind_of_source_has_a_manifest(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    archive(tmp_path / "a.tar", 2)
    for source in (config.Glyphs(limit=5), config.Pictures(str(tmp_path)), config.Tar(str(tmp_path / "a.tar"))):
        told = manifest(open_source(source))
        assert told and manifest(open_source(source), told) == told and all(len(row["sha256"]) == 64 for row in told)


def test_a_file_that_has_not_changed_is_not_hashed_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x"}\n')
    open_rows = lambda: open_source(config.File(str(path)))
    (first,) = manifest(open_rows())
    known = first | {"sha256": "as before"}
    assert manifest(open_rows(), [known]) == [known]
    os.utime(path, ns=(1, 1))
    assert manifest(open_rows(), [known])[0]["sha256"] == first["sha256"]

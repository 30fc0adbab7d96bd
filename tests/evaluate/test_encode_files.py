"""Encoding files: formats, resuming after an interruption, bounded memory, and rows that are no text."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjax.config.errors import ConfigError, DataError
from embedjax.evaluate import files
from embedjax.evaluate.encode import Encoder, encode
from embedjax.evaluate.files import encode_file
from embedjax.evaluate.progress import Display


@pytest.fixture(scope="module")
def vectors(model, sentences):
    return encode(model, sentences)


def write(folder, sentences, kind):
    path = folder / f"input.{kind}"
    if kind == "txt":
        path.write_text("\n".join(sentences) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": n, "body": text}) + "\n" for n, text in enumerate(sentences)))
    else:
        pq.write_table(pa.table({"id": range(len(sentences)), "body": sentences}), path)
    return path


@pytest.mark.parametrize(("kind", "ending"), [("txt", "npy"), ("jsonl", "parquet"), ("parquet", "npy")])
def test_formats(model, sentences, vectors, tmp_path, kind, ending):
    source, output = write(tmp_path, sentences, kind), tmp_path / f"output.{ending}"
    column = None if kind == "txt" else "body"
    assert encode_file(model, source, output, column=column, block=64) == 150
    if ending == "npy":
        found = np.load(output)
    else:
        table = pq.read_table(output)
        assert table.column("body").to_pylist() == sentences
        assert pq.ParquetFile(output).num_row_groups == 3
        found = np.array(table.column("embedding").to_pylist(), np.float32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vectors, atol=2e-6)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, output.name}


class Killed(Exception):
    pass


def killed_after(monkeypatch, blocks):
    """The encoder dies in the middle of its work, after some blocks; lists the rows of each block it begins."""
    begun, embed = [], Encoder.embed

    def embed_or_die(self, columns, *rest):
        begun.append(len(columns["ids"]))
        if len(begun) > blocks:
            raise Killed
        return embed(self, columns, *rest)

    monkeypatch.setattr(Encoder, "embed", embed_or_die)
    return begun


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_goes_on_after_a_kill(model, sentences, tmp_path, monkeypatch, ending):
    source = write(tmp_path, sentences, "txt")
    encode_file(model, source, tmp_path / f"whole.{ending}", block=32)
    output = tmp_path / f"output.{ending}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        encode_file(model, source, output, block=32)
    assert not output.exists()
    with (tmp_path / f"output.{ending}.partial").open("ab") as partial:
        partial.write(b"half a block")  # written, but not counted yet
    told = []
    with monkeypatch.context() as patch:
        begun = killed_after(patch, 99)
        encode_file(model, source, output, block=32, progress=lambda *now: told.append(now))
    assert begun == [32, 22] and told[0] == (96, 150) and told[-1] == (150, 150)
    assert output.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_refuses_to_go_on_with_another_encoding(model, two_towers, sentences, tmp_path, monkeypatch):
    source, output = write(tmp_path, sentences, "txt"), tmp_path / "output.npy"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        encode_file(model, source, output, block=32)
    with pytest.raises(ConfigError, match="other model.*partial"):
        encode_file(two_towers, source, output, as_column="positive", block=32)
    source.write_text("w1\n")
    with pytest.raises(ConfigError, match="other input"):
        encode_file(model, source, output, block=32)


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"body": ""}', "empty"), (b'{"body": 5}', "int, not text"), (b'{"id": 1}', "missing"), (b'{"body": "\xff"}', "UTF-8")],
)
def test_a_bad_row_is_told_and_nothing_is_lost(model, sentences, tmp_path, line, reason):
    source, output = write(tmp_path, sentences, "jsonl"), tmp_path / "output.npy"
    good = source.read_bytes()
    lines = good.splitlines()
    source.write_bytes(b"\n".join([*lines[:100], line, *lines[101:]]) + b"\n")
    with pytest.raises(DataError, match=rf"input.jsonl:101: .*{reason}"):
        encode_file(model, source, output, column="body", block=32)
    assert json.loads((tmp_path / "output.npy.partial.json").read_text())["rows"] == 96
    assert not output.exists()


def test_rows_are_read_a_block_at_a_time(model, sentences, tmp_path, monkeypatch):
    """At most the block at work, the one made ahead, and no more, are in memory."""
    source, ahead, read = write(tmp_path, sentences, "txt"), [], [0]
    texts_of = files.texts_of

    def counted(*arguments):
        for text in texts_of(*arguments):
            read[0] += 1
            yield text

    monkeypatch.setattr(files, "texts_of", counted)
    encode_file(model, source, tmp_path / "output.npy", block=16, progress=lambda done, _: ahead.append(read[0] - done))
    assert read[0] == 150 and max(ahead) <= 2 * 16


def test_wrong_arguments(model, tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"a": "w1", "b": "w2"}\n')
    with pytest.raises(ConfigError, match=r"\.npy, \.parquet"):
        encode_file(model, source, tmp_path / "output.txt", column="a")
    with pytest.raises(ConfigError, match="a, b"):
        encode_file(model, source, tmp_path / "output.npy")
    with pytest.raises(DataError, match="did you mean 'a'|found: a, b"):
        encode_file(model, source, tmp_path / "output.npy", column="aa")
    with pytest.raises(DataError):
        encode_file(model, tmp_path / "absent.txt", tmp_path / "output.npy")


def test_progress_on_a_terminal():
    out = io.StringIO()
    out.isatty = lambda: True
    with Display("encode", out):
        assert out.getvalue() == "", "no bar before there is something to tell"
    with Display("encode", out) as display:
        display(10, 100)
        display(100, 100)
    assert "100/100" in out.getvalue()


def test_progress_in_plain_lines(capsys):
    with Display("encode") as display:
        display(100, 1000)
        display(500, 1000)
        display(1000, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("encode: 1,000 of 1,000 (100%), ")

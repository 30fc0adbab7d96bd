"""Encoding files by late interaction: forms, resuming after a kill, bounded memory, and rows that are no text."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.text import Texts
from embedjax.evaluate import files, token_files
from embedjax.evaluate.engines import Feed
from embedjax.evaluate.files import encode_file
from embedjax.evaluate.late import TokenEncoder, encode_tokens, maxsim_topk
from embedjax.evaluate.token_files import encode_tokens_file, ranges_of, starts_of
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.models.embedder import build_embedder

LATE = c.Late("", "", query_length=8, document_length=16, expand=False, skip=("w5",))


@pytest.fixture(scope="module")
def late(model):
    """The small tower with a vector of 8 numbers a token; documents do without w5."""
    tower = dataclasses.replace(model.config.towers["text"], late=LATE, dense=(c.Dense(8, False, "identity"),), max_length=16)
    embedder = build_embedder(tower)
    return dataclasses.replace(
        model,
        config=c.Model({"text": tower}),
        embedders={"text": embedder},
        params={"towers": {"text": jax.jit(embedder.init)(jax.random.key(3))}},
        texts={"text": Texts(model.texts["text"].tokenizer, max_length=16, prompts=tower.prompts, late=LATE)},
    )


@pytest.fixture(scope="module")
def known(late, sentences):
    return encode_tokens(late, sentences)


def write(folder, sentences, column="text"):
    path = folder / "input.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{n}", column: text}) + "\n" for n, text in enumerate(sentences)))
    return path


def read(output):
    """The vectors in a file of any form."""
    if output.suffix == ".npy":
        return TokenVectors(np.load(output, mmap_mode="r"), np.load(starts_of(output)))
    if output.suffix == ".parquet":
        texts = [np.array(text, np.float32).reshape(-1, 8) for text in pq.read_table(output).column("embedding").to_pylist()]
        return TokenVectors.joined(texts, 8)
    fields = [json.loads(line)["fields"]["colbert"] for line in output.read_text().splitlines()]
    tensors = [np.frombuffer(bytes.fromhex("".join(field.values())), ">f4").reshape(-1, 8) for field in fields]
    return TokenVectors.joined([tensor.astype(np.float32) for tensor in tensors], 8)


def feed_of(ending):
    return Feed("vespa") if ending == "jsonl" else None


@pytest.mark.parametrize("ending", ["npy", "parquet", "jsonl"])
def test_forms(late, sentences, known, tmp_path, ending):
    source, output = write(tmp_path, sentences), tmp_path / f"output.{ending}"
    assert encode_tokens_file(late, source, output, feed=feed_of(ending), block=64) == 150
    found = read(output)
    np.testing.assert_array_equal(found.starts, known.starts)
    np.testing.assert_allclose(found.vectors, known.vectors, atol=2e-6)
    made = {source.name, output.name} | ({"output.starts.npy"} if ending == "npy" else set())
    assert {path.name for path in tmp_path.iterdir()} == made
    if ending == "npy":
        queries = encode_tokens(late, sentences[:5], column="query")
        for one, other in zip(maxsim_topk(queries, found, 3), maxsim_topk(queries, known, 3), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    if ending == "parquet":
        assert pq.read_table(output).column("text").to_pylist() == sentences
        assert pq.ParquetFile(output).num_row_groups == 3
        assert pq.read_schema(output).field("embedding").type == pa.list_(pa.list_(pa.float32(), 8))


def test_a_column_called_query_holds_queries(late, sentences, tmp_path):
    """Which are cut after 8 tokens, have a prompt and keep w5."""
    source = write(tmp_path, sentences, "query")
    for as_column, column in ((None, "query"), ("query", "query"), ("document", "document")):
        encode_tokens_file(late, source, tmp_path / "output.npy", column="query", as_column=as_column)
        known = encode_tokens(late, sentences, column=column)
        np.testing.assert_array_equal(read(tmp_path / "output.npy").starts, known.starts)
    with pytest.raises(ConfigError, match="--as query or --as document, not text"):
        encode_tokens_file(late, source, tmp_path / "output.npy", column="query", as_column="text")


def test_documents_are_pooled(late, sentences, tmp_path):
    source, known = write(tmp_path, sentences), encode_tokens(late, sentences, pool=2)
    encode_tokens_file(late, source, tmp_path / "output.npy", pool=2)
    found = read(tmp_path / "output.npy")
    np.testing.assert_array_equal(found.starts, known.starts)
    np.testing.assert_allclose(found.vectors, known.vectors, atol=2e-6)
    with pytest.raises(ConfigError, match="--pool is for documents"):
        encode_tokens_file(late, source, tmp_path / "output.npy", as_column="query", pool=2)


@pytest.mark.parametrize("precision", ["float16", "int8", "uint8", "binary"])
def test_codes(late, sentences, known, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(token_files, "QUANTIZED_ROWS", 100)
    source, output = write(tmp_path, sentences), tmp_path / "output.npy"
    encode_tokens_file(late, source, output, precision=precision)
    ranges = np.load(ranges_of(output)) if precision in ("int8", "uint8") else None
    found = TokenVectors(np.load(output, mmap_mode="r"), np.load(starts_of(output)), precision, ranges, 8)
    wanted = known.quantized(precision)
    assert found.vectors.dtype == wanted.vectors.dtype and found.vectors.shape == wanted.vectors.shape
    if ranges is not None:
        np.testing.assert_allclose(ranges, wanted.ranges, atol=2e-6)
    off = np.abs(found.rows(slice(None)) - wanted.rows(slice(None)))
    assert (off > 0.02).mean() < 0.001  # a number at the edge of a code may be on its other side
    made = {source.name, output.name, "output.starts.npy"} | ({"output.ranges.npy"} if ranges is not None else set())
    assert {path.name for path in tmp_path.iterdir()} == made
    encode_tokens_file(late, source, output)
    assert not ranges_of(output).exists() and np.load(output).dtype == np.float32


class Killed(Exception):
    pass


def killed_after(monkeypatch, blocks):
    """The encoder dies in the middle of its work, after some blocks; lists the rows of each block it begins."""
    begun, token_vectors = [], TokenEncoder.token_vectors

    def dying(self, columns, *rest):
        begun.append(len(columns["ids"]))
        if len(begun) > blocks:
            raise Killed
        return token_vectors(self, columns, *rest)

    monkeypatch.setattr(TokenEncoder, "token_vectors", dying)
    return begun


@pytest.mark.parametrize("ending", ["npy", "parquet", "jsonl"])
def test_goes_on_after_a_kill(late, sentences, tmp_path, monkeypatch, ending):
    source, how = write(tmp_path, sentences), {"feed": feed_of(ending), "block": 32}
    encode_tokens_file(late, source, tmp_path / f"whole.{ending}", **how)
    output = tmp_path / f"output.{ending}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        encode_tokens_file(late, source, output, **how)
    assert not output.exists()
    for name in ("partial", "partial.lengths"):  # written, but not counted yet
        with (tmp_path / f"output.{ending}.{name}").open("ab") as partial:
            partial.write(b"half a block")
    told = []
    with monkeypatch.context() as patch:
        begun = killed_after(patch, 99)
        encode_tokens_file(late, source, output, progress=lambda *now: told.append(now), **how)
    assert begun == [32, 22] and told[0] == (96, 150) and told[-1] == (150, 150)
    assert output.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    if ending == "npy":
        assert starts_of(output).read_bytes() == (tmp_path / "whole.starts.npy").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_refuses_to_go_on_with_another_encoding(late, sentences, tmp_path, monkeypatch):
    source, output = write(tmp_path, sentences), tmp_path / "output.npy"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)
        encode_tokens_file(late, source, output, block=32)
    with pytest.raises(ConfigError, match="other as_column"):
        encode_tokens_file(late, source, output, as_column="query", block=32)


def test_rows_are_read_a_block_at_a_time(late, sentences, tmp_path, monkeypatch):
    """At most the block at work, the one made ahead, and no more, are in memory."""
    source, ahead, read_rows = write(tmp_path, sentences), [], [0]
    texts_of = files.texts_of

    def counted(*arguments):
        for text in texts_of(*arguments):
            read_rows[0] += 1
            yield text

    monkeypatch.setattr(files, "texts_of", counted)
    progress = lambda done, _: ahead.append(read_rows[0] - done)
    encode_tokens_file(late, source, tmp_path / "output.npy", block=16, progress=progress)
    assert read_rows[0] == 150 and max(ahead) <= 2 * 16


def test_a_bad_row_is_told_and_nothing_is_lost(late, sentences, tmp_path):
    source, output = write(tmp_path, [*sentences[:100], "", *sentences[101:]]), tmp_path / "output.npy"
    with pytest.raises(DataError, match=r"input.jsonl:101: .*empty"):
        encode_tokens_file(late, source, output, block=32)
    assert json.loads((tmp_path / "output.npy.partial.json").read_text())["rows"] == 96


def test_an_empty_file_is_no_vectors(late, tmp_path):
    (tmp_path / "none.txt").write_text("")
    try:
        count = encode_tokens_file(late, tmp_path / "none.txt", tmp_path / "output.npy")
    except DataError:
        return
    assert count == 0 and read(tmp_path / "output.npy").vectors.shape == (0, 8)


def test_wrong_arguments(late, model, tmp_path):
    source = write(tmp_path, ["w1", "w2"])
    with pytest.raises(ConfigError, match=r"\.npy, \.parquet, \.jsonl"):
        encode_tokens_file(late, source, tmp_path / "output.txt")
    with pytest.raises(ConfigError, match="--for qdrant or --for vespa"):
        encode_tokens_file(late, source, tmp_path / "output.jsonl")
    with pytest.raises(ConfigError, match="--for qdrant or --for vespa"):
        encode_tokens_file(late, source, tmp_path / "output.npy", feed=Feed("qdrant"))
    with pytest.raises(ConfigError, match="codes of int8 are written to .npy alone"):
        encode_tokens_file(late, source, tmp_path / "output.parquet", precision="int8")
    with pytest.raises(DataError, match="did you mean 'id'"):
        encode_tokens_file(late, source, tmp_path / "output.jsonl", feed=Feed("qdrant", ids="ids"))
    with pytest.raises(ConfigError, match="vector a token"):
        encode_tokens_file(model, source, tmp_path / "output.npy")
    with pytest.raises(ConfigError, match="vector a token"):
        encode_file(late, source, tmp_path / "output.npy")

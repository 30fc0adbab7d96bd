"""Mined negatives in batches: those of the last mining before the step, not read before it was made."""

import json

import numpy as np
import pytest

from embedjax.config import Data, File, Mine, Set
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.batches import Abstract, Batches
from embedjax.data.mined import Mined
from embedjax.data.sources import open_source
from embedjax.data.text import Texts
from embedjax.data.tokenizer import train_wordpiece

COLUMNS = {"anchor": "q", "positive": "a"}


@pytest.fixture
def run(tmp_path):
    """Batches of 12 pairs, one of them bad, with two mined negatives every five steps from a corpus of four more texts."""
    pairs, corpus = tmp_path / "pairs.jsonl", tmp_path / "corpus.jsonl"
    rows = [{"q": f"q {k}", "a": f"a {k}" if k != 7 else ""} for k in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus.write_text("".join(json.dumps({"text": f"d {k}"}) + "\n" for k in range(4)))
    tokenizer = train_wordpiece(["q a d 0 1 2 3 4 5 6 7 8 9"], 60)

    def make(buckets=()):
        mine = Mine(num_negatives=2, every=5, corpus=File(str(corpus)))
        which = Set(File(str(pairs)), COLUMNS, mine=mine, name="a b")
        source = open_source(which.source)
        mined = Mined(which, source, tmp_path / "run" / "mined")
        data = Data(batch_size=4, sets=(which,), bad_share=0.2, prefetch=2, threads=1, buckets=buckets)
        texts = dict.fromkeys(("anchor", "positive", "negative"), Texts(tokenizer, 8))
        return Batches(data, [source], texts, seed=0, steps=12, mined={"a b": mined}), mined

    return make


def numbers(shift):
    return np.stack([(np.arange(12) + shift) % 15, (np.arange(12) + shift + 1) % 15], 1).astype(np.int32)


def words(batches, ids):
    return [batches.texts["anchor"].tokenizer.decode(row.tolist()) for row in ids]


def test_each_step_has_the_negatives_of_the_last_mining(run):
    batches, mined = run()
    stream = batches.iterate(0)
    with pytest.raises(DataError, match="mined at step 0 cannot be read"):
        batches.batch(0)
    stream.close()
    mined.keep(0, numbers(0))
    stream, made = run()[0].iterate(0), []
    for step in range(12):
        if step in (5, 10):  # mined only now: nothing was made ahead of it
            assert not mined.there(step)
            mined.keep(step, numbers(step))
        made.append(next(stream)[1])
    assert next(stream, None) is None
    for step, columns in enumerate(made):
        taken = numbers(step // 5 * 5)
        for k, negatives in zip(words(batches, columns["anchor"]["ids"]), columns["negative"]["ids"], strict=True):
            assert words(batches, negatives) == mined.corpus.take(taken[int(k.split()[1])])
        assert {"negative", "row"} <= columns.keys() and columns["hash"]["negative"].shape == (4, 2, 2)
    again = list(run()[0].iterate(7))
    assert len(again) == 5
    np.testing.assert_array_equal(again[0][1]["negative"]["ids"], made[7]["negative"]["ids"])


def test_shapes_and_buckets(run):
    batches, mined = run(((5, 5), (4, 8), (8, 8)))
    mined.keep(0, numbers(0))
    for step in range(5):
        columns = batches.batch(step)[1]
        abstract = {name: Abstract(columns[name]["ids"].shape, np.dtype(np.int32)) for name in ("anchor", "negative")}
        assert abstract in [{name: shape[name]["ids"] for name in abstract} for _, shape in batches.shapes()]
        assert columns["negative"]["ids"].shape[2] == 8  # never cut to the length of the positive
    shown = batches.decoded(0, 1)[0]
    assert list(shown) == ["anchor", "positive"]


def test_files_of_another_shape_are_refused(run):
    batches, mined = run()
    for odd in (np.zeros((11, 2), np.int32), np.full((12, 2), 15, np.int32)):
        mined.keep(0, odd)
        with pytest.raises(DataError, match=r"a_b-\w{8}-0.npy: holds"):
            run()[0].batch(0)
    mined.file(0).write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        batches.batch(0)


def test_a_column_that_is_not_there_is_one_of_the_set(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"q": "a", "a": "b"}\n')
    which = Set(File(str(tmp_path / "pairs.jsonl")), {"anchor": "q", "positive": "answer"}, mine=Mine(), name="pairs")
    with pytest.raises(DataError, match="set 'pairs': .*pairs.jsonl has no column 'answer'"):
        Mined(which, open_source(which.source), tmp_path)


def test_sets_whose_names_are_alike_have_files_of_their_own(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"q": "a", "a": "b"}\n')
    made = lambda name: Set(File(str(tmp_path / "pairs.jsonl")), COLUMNS, mine=Mine(), name=name)
    sets = [made(name) for name in ("a b", "a_b", "a?b")]
    files = [Mined(which, open_source(which.source), tmp_path).file(0) for which in sets]
    assert len(set(files)) == 3 and files[1].name == "a_b-0.npy" and {file.parent for file in files} == {tmp_path}


@pytest.mark.parametrize("columns", [{"anchor": "q"}, {**COLUMNS, "negative": "n"}])
def test_sets_that_cannot_be_mined(columns):
    with pytest.raises(ConfigError, match="mining takes the columns anchor and positive"):
        Set(columns=columns, mine=Mine())

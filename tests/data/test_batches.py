"""Batches: the same global batch however many hosts make it, from whatever step; exact shapes; bad rows and errors told."""

import collections
import dataclasses
import hashlib
import json
import zlib

import jax
import numpy as np
import pytest

from embedjax.config import Data, File, Mine, MultipleNegatives, Set
from embedjax.config.errors import ConfigError, DataError
from embedjax.data.batches import Abstract, Batches
from embedjax.data.sources import open_source
from embedjax.data.text import Texts
from embedjax.data.tokenizer import train_wordpiece

BUCKETS = ((6, 6), (12, 12))


class Words:
    """One token a word, after a start token; stands for Texts."""

    filled = False

    def __init__(self, max_length=12, prompts=None, include_prompt=True):
        self.max_length, self.prompts, self.default_prompt = max_length, prompts or {}, None
        self.include_prompt, self.tokenizer = include_prompt, self

    def to_str(self):
        return "words"

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(id) for id in ids)

    def _tokens(self, text, prompt):
        words = ((self.prompts[prompt] + " ") if prompt else "") + text
        return [1, *(zlib.crc32(word.encode()) % 1000 + 2 for word in words.split())][: self.max_length]

    def lengths(self, texts, prompt=None):
        return np.array([len(self._tokens(text, prompt)) for text in texts], np.int32)

    def encode(self, texts, *, length=None, prompt=None):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = self._tokens(text, prompt)[:length]
            row[: len(tokens)] = tokens
        result = {"ids": ids, "mask": ids > 0}
        return result if self.include_prompt or not prompt else {**result, "pool": ids > 1}


def row(k):
    """Row k of the file: its number is the first word of each text."""
    return {
        "q": f"{k} " + "w " * (k % 11),
        "a": f"{k} " + "v " * (k % 7),
        "n": f"{k} x",
        "m": f"{k} y z",
        "s": k / 4,
        "l": k % 3,
    }


@pytest.fixture
def make(tmp_path):
    """Batches of rows written to a file."""

    def build(rows=range(40), *, columns=None, words=None, sets=None, prompts=None, steps=20, seed=0, data=None, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row(k) if isinstance(k, int) else k) + "\n" for k in rows))
        columns = columns or {"anchor": "q", "positive": "a"}
        sets = sets or (Set(File(str(file)), columns),)
        config = Data(**{"batch_size": 4, "sets": sets, **(data or {})})
        texts = dict.fromkeys(("anchor", "positive", "negative"), words or Words())
        sources = [open_source(each.source) for each in sets]
        prompts = prompts and [prompts] * len(sets)
        return Batches(config, sources, texts, prompts, seed=seed, steps=steps, **{"run_folder": tmp_path / "run", **options})

    return build


def assert_same(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


FULL = {"anchor": "q", "positive": "a", "negative": "n", "negative_2": "m", "score": "s", "label": "l"}


@pytest.mark.parametrize(
    ("pair", "told"), [((8, 12), "'anchor' are filled to 12 .* first number 8"), ((12, 8), "'positive'.* second")]
)
def test_a_bucket_shorter_than_texts_are_filled_to(make, pair, told):
    words = Words()
    words.filled = True
    make(words=words, data={"buckets": ((12, 12),)})
    with pytest.raises(ConfigError, match=told):
        make(words=words, data={"buckets": (pair, (12, 12))})


def test_a_batch_holds_what_the_contract_says(make):
    batches = make(columns=FULL, data={"buckets": ((5, 8),)})
    task, columns = batches.batch(0)
    rows = batches.rows_of(0)
    expect = Words()
    assert task == "train"
    assert set(columns) == {"anchor", "positive", "negative", "hash", "row", "scores", "labels"}
    for name, key, length in (("anchor", "q", 5), ("positive", "a", 8)):
        encoded = expect.encode([row(k)[key] for k in rows], length=length)
        np.testing.assert_array_equal(columns[name]["ids"], encoded["ids"])
        np.testing.assert_array_equal(columns[name]["mask"], encoded["mask"])
    assert columns["negative"]["ids"].shape == columns["negative"]["mask"].shape == (4, 2, 8)
    for k, key in enumerate("nm"):
        np.testing.assert_array_equal(
            columns["negative"]["ids"][:, k], expect.encode([row(r)[key] for r in rows], length=8)["ids"]
        )
        text = row(rows[3])[key]
        words = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4")
        np.testing.assert_array_equal(columns["hash"]["negative"][3, k], words)
    assert columns["hash"]["anchor"].shape == (4, 2) and columns["hash"]["negative"].shape == (4, 2, 2)
    assert columns["row"].tolist() == [0, 1, 2, 3] and columns["row"].dtype == np.int32
    np.testing.assert_array_equal(columns["scores"], (rows / 4).astype(np.float32))
    np.testing.assert_array_equal(columns["labels"], (rows % 3).astype(np.int32))


@pytest.mark.parametrize("columns", [FULL, {"anchor": "q"}])
def test_shapes_are_those_of_the_batches(make, columns):
    words = Words(prompts={"p": "find"}, include_prompt=False)
    batches = make(columns=columns, words=words, prompts={"anchor": "p"}, data={"buckets": BUCKETS})
    shapes = batches.shapes()
    assert [task for task, _ in shapes] == ["train", "train"]
    met = []
    for step in range(10):
        task, arrays = batches.batch(step)
        abstract = jax.tree.map(lambda leaf: Abstract(leaf.shape, leaf.dtype), arrays)
        met.append(shapes.index((task, abstract)))
    assert set(met) == {0, 1} and batches.compilations() == 2
    assert "pool" in shapes[0][1]["anchor"]
    jax.eval_shape(lambda tree: tree["anchor"]["ids"] + 1, shapes[0][1])


@dataclasses.dataclass(frozen=True)
class Masked(MultipleNegatives):
    """A loss that masks words."""

    words = True


def test_sets_of_other_columns_than_pairs(make, tmp_path):
    rows = [{"t": f"{k} w", "u": "v", "c": ["x", "y"][: k % 3], "v": [k, 1.0], "s": k, "z": -k, "n": "x"} for k in range(8)]
    sets = [
        Set(columns={"anchor": "t"}, loss=Masked(), name="alone"),
        Set(columns={"anchor": "t", "label": "c"}, labels=("x", "y"), name="several"),
        Set(columns={"anchor": "t", "label": "n"}, labels=("x", "y"), name="named"),
        Set(columns={"anchor": "t", "positive": "u", "score": "s", "score_2": "z", "vector": "v"}, name="taught"),
    ]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    sets = tuple(dataclasses.replace(each, source=File(str(file))) for each in sets)
    words = Texts(train_wordpiece(["0 1 2 3 4 5 6 7 v w"], 100), 12)
    batches = make(sets=sets, words=words, steps=8)
    shapes = dict(batches.shapes())
    for step in range(8):
        task, columns = batches.batch(step)
        assert jax.tree.map(lambda leaf: Abstract(leaf.shape, leaf.dtype), columns) == shapes[task]
        k = batches.rows_of(step)
        match task:
            case "alone":
                assert set(columns) == {"anchor", "hash", "row"}
                assert columns["anchor"]["word"][:, :5].tolist() == [[-1, 0, 1, -1, -1]] * 4
            case "several":
                assert columns["labels"].tolist() == [[float(j % 3 > 0), float(j % 3 > 1)] for j in k]
            case "named":
                assert columns["labels"].tolist() == [0] * 4
            case "taught":
                assert columns["scores"].tolist() == [[j, -j] for j in k] and "word" not in columns["anchor"]
                assert columns["vectors"].tolist() == [[j, 1.0] for j in k]
    assert batches.compilations() == 4


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_hosts_make_slices_of_one_batch(make, buckets):
    whole = make(columns=FULL, data={"buckets": buckets})
    for hosts in (2, 4):
        parts = [make(columns=FULL, data={"buckets": buckets}, process_index=p, process_count=hosts) for p in range(hosts)]
        for step in (0, 9, 10):
            made = [part.batch(step) for part in parts]
            joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[columns for _, columns in made])
            assert_same(whole.batch(step), (made[0][0], joined))


def first_words(batches, steps):
    """How often each row was trained on, by the id of its first word."""
    return collections.Counter(int(k) for step in steps for k in batches.batch(step)[1]["anchor"]["ids"][:, 1])


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_epochs_are_complete_and_disjoint_across_hosts(make, buckets):
    parts = [make(data={"buckets": buckets}, process_index=p, process_count=2) for p in range(2)]
    expected = collections.Counter(Words()._tokens(str(k), None)[1] for k in range(40))
    for epoch in range(2):
        steps = range(10 * epoch, 10 * epoch + 10)
        assert first_words(parts[0], steps) + first_words(parts[1], steps) == expected


def test_iterate_goes_on_from_any_step(make):
    batches = make(data={"buckets": BUCKETS})
    for start in (0, 13, 20):
        made = list(batches.iterate(start))
        assert len(made) == 20 - start
        for step, batch in enumerate(made, start):
            assert_same(batch, batches.batch(step))
    early = batches.iterate(0)
    next(early)
    early.close()


def test_the_same_seed_gives_the_same_batches(make):
    batches, again, other = make(seed=7), make(seed=7), make(seed=8)
    for step in (19, 0, 12):
        assert_same(batches.batch(step), again.batch(step))
    assert any((batches.rows_of(step) != other.rows_of(step)).any() for step in range(3))


def test_buckets_fit_and_pad_less(make):
    batches, plain = make(data={"buckets": BUCKETS}), make()
    expect = Words()
    lengths = np.array([[expect.lengths([row(k)[key]])[0] for key in "qa"] for k in range(40)])
    for step in range(10):
        plain.batch(step)
        columns = batches.batch(step)[1]
        bucket = (columns["anchor"]["ids"].shape[1], columns["positive"]["ids"].shape[1])
        assert bucket in BUCKETS and (lengths[batches.rows_of(step)] <= bucket).all()
    assert list((batches.bad.path.parent / "lengths").iterdir())
    assert plain.padding_share() == pytest.approx(1 - lengths.sum() / (40 * 24))
    assert 0 < batches.padding_share() < plain.padding_share()


def test_several_sets_have_their_own_task_and_columns(make, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"t": f"{k} o", "l": k}) + "\n" for k in range(20)))
    sets = (
        Set(File(str(tmp_path / "rows.jsonl")), {"anchor": "q", "positive": "a"}, name="pairs"),
        Set(File(str(other)), {"anchor": "t", "label": "l"}, name="classes"),
    )
    batches = make(sets=sets, steps=15)
    made = list(batches.iterate(0))
    assert collections.Counter(task for task, _ in made)["classes"] == 5 and len(made) == 15
    assert {task: "labels" in columns for task, columns in made} == {"pairs": False, "classes": True}
    assert [task for task, _ in batches.shapes()] == ["pairs", "classes"]


def mixture(tmp_path, **data):
    """Three sets of 40, 12 and 3 rows; the first word of each text is its row number, the second its set."""
    sets = []
    for at, (count, column) in enumerate([(40, "q"), (12, "q"), (3, "text")]):
        file = tmp_path / f"set{at}.jsonl"
        file.write_text("".join(json.dumps({column: f"{k} s{at}", "a": f"{k} s{at} x"}) + "\n" for k in range(count)))
        sets.append(Set(File(str(file)), {"anchor": column, "positive": "a"}, name=f"s{at}"))
    return {"sets": tuple(sets), "data": {"sets": tuple(sets), **data}}


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_mixed_rows_are_one_task(make, tmp_path, buckets):
    options = mixture(tmp_path, draw="rows", buckets=buckets, temperature=2.0)
    whole = make(**options, steps=30)
    parts = [make(**options, process_index=p, process_count=2, steps=30) for p in range(2)]
    met = collections.Counter()
    for step in range(30):
        task, columns = whole.batch(step)
        made = [part.batch(step) for part in parts]
        assert_same((task, columns), ("s0", jax.tree.map(lambda *leaves: np.concatenate(leaves), *[one for _, one in made])))
        draw = whole.order.at(step)
        texts = [f"{k} s{at}" for k, at in zip(draw.rows, draw.sets, strict=True)]
        assert columns["anchor"]["ids"][:, :3].tolist() == [Words()._tokens(text, None) for text in texts]
        assert (columns["positive"]["ids"][:, 1:3] == columns["anchor"]["ids"][:, 1:3]).all()
        met.update(draw.sets.tolist())
    assert [task for task, _ in whole.shapes()] == ["s0"] * max(1, len(buckets))
    assert [met[at] / 120 for at in range(3)] == pytest.approx(np.sqrt([40, 12, 3]) / np.sqrt([40, 12, 3]).sum(), abs=0.03)
    assert_same(next(iter(whole.iterate(17))), whole.batch(17))
    assert [shown["anchor"][0] for shown in whole.decoded(3, 2)] == [
        f"{k} s{at}" for k, at in zip(whole.order.at(3).rows[:2], whole.order.at(3).sets[:2], strict=True)
    ]


def test_rows_with_negatives_and_rows_that_mine_them_are_shown(make, tmp_path):
    sets = []
    for at, columns in enumerate(({"anchor": "q", "positive": "a", "negative": "n"}, {"anchor": "q", "positive": "a"})):
        file = tmp_path / f"set{at}.jsonl"
        file.write_text("".join(json.dumps(row(k)) + "\n" for k in range(8)))
        sets.append(Set(File(str(file)), columns, mine=Mine() if at else None, name=f"s{at}"))
    for order in (sets, sets[::-1]):
        batches = make(sets=tuple(order), data={"sets": tuple(order), "draw": "rows", "batch_size": 8})
        columns = {"s0": ["anchor", "positive", "negative"], "s1": ["anchor", "positive"]}
        wanted = [columns[order[at].name] for at in batches.order.at(0).sets]
        assert [list(shown) for shown in batches.decoded(0, 8)] == wanted and len(set(map(len, wanted))) == 2


def test_mixed_rows_have_arrays_of_one_shape(make, tmp_path):
    sets = []
    for at, vector in enumerate(([1.0], [1.0, 2.0])):
        file = tmp_path / f"set{at}.jsonl"
        file.write_text(json.dumps({"t": "x", "v": vector}) * 1 + "\n")
        sets.append(Set(File(str(file)), {"anchor": "t", "vector": "v"}, name=f"s{at}"))
    with pytest.raises(ConfigError, match="vectors of sets 's0' and 's1' have different shapes"):
        make(sets=tuple(sets), data={"sets": tuple(sets), "draw": "rows", "batch_size": 2})


def test_bad_rows_of_a_mixed_batch_are_replaced_from_their_set(make, tmp_path):
    options = mixture(tmp_path, draw="rows", bad_share=0.2)
    file = tmp_path / "set1.jsonl"
    file.write_text(file.read_text().replace('"5 s1"', '""'))
    batches = make(**options, steps=14)
    for step in range(14):
        draw, ids = batches.order.at(step), batches.batch(step)[1]["anchor"]["ids"]
        assert ids[:, 2].tolist() == [Words()._tokens(f"s{at}", None)[1] for at in draw.sets]
    assert batches.bad.count == 1


BAD = [{"q": "", "a": "x"}, {"a": "x"}, {"q": "q", "a": None}, {"q": "q", "a": 3}, "a string"]


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_bad_rows_are_replaced_alike_and_listed_once(make, tmp_path, buckets):
    rows = [*range(35), *BAD]
    options = {"data": {"bad_share": 0.2, "buckets": buckets}}
    whole = [make(rows, run_folder=tmp_path / name, **options) for name in ("run", "again")]
    hosts = [make(rows, run_folder=tmp_path / "hosts", process_index=p, process_count=2, **options) for p in range(2)]
    for step in range(10):
        batch = whole[0].batch(step)
        assert_same(batch, whole[1].batch(step))
        halves = [host.batch(step)[1] for host in hosts]
        assert_same(batch, (batch[0], jax.tree.map(lambda a, b: np.concatenate([a, b]), *halves)))
        limits = [batch[1][name]["ids"].shape[1] for name in ("anchor", "positive")]
        assert not buckets or tuple(limits) in BUCKETS
    trained = first_words(whole[0], range(10))
    assert sum(trained.values()) == 40 and len(trained) == 35
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert whole[0].bad.count == 5 and sorted(line["row"] for line in listed) == [36, 37, 38, 39, 40]


def test_a_restart_lists_nothing_twice(make, tmp_path):
    for _ in range(2):
        batches = make([*range(38), *BAD[:2]], data={"bad_share": 0.2})
        list(batches.iterate(0))
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in listed) == [39, 40]
    assert {line["reason"] for line in listed} == {"column 'q' is empty", "column 'q' is missing"}


def test_too_many_bad_rows_come_out_of_the_iterator_as_their_error(make):
    batches = make([*range(32), *[BAD[0]] * 8], data={"bad_share": 0.1, "threads": 2})
    with pytest.raises(
        DataError, match=r"of set 'train' are bad .*bad_share 10.0%.*rows.jsonl, row \d+: column 'q' is empty"
    ) as caught:
        list(batches.iterate(0))
    assert type(caught.value) is DataError and "\n" not in str(caught.value)


def test_lists_stop_the_run(make):
    batches = make([*range(3), {"q": "x", "a": ["y", "z"]}], steps=1)
    with pytest.raises(DataError, match=r"rows.jsonl, row 4: column 'a' holds list values"):
        list(batches.iterate(0))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"data": {"batch_size": 41}}, DataError, "rows.jsonl has 40 rows, fewer than data.batch_size 41"),
        ({"process_count": 3}, ConfigError, "batch_size 4 is not divisible by the 3 processes"),
        ({"columns": {"anchor": "q", "positive": "answer"}}, DataError, "'answer'"),
        ({"columns": {"anchor": "q", "positve": "a"}}, ConfigError, "did you mean 'positive'"),
        ({"data": {"buckets": ((6, 6), (13, 12))}}, ConfigError, r"\(13, 12\).*\(12, 12\)"),
    ],
)
def test_what_cannot_be(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_column_without_a_tower(make):
    batches = make()
    with pytest.raises(ConfigError, match="'positive'"):
        Batches(batches.data, batches.sources, {"anchor": Words()}, seed=0, steps=1)


def test_decoded_shows_text_and_tokens(make):
    batches = make(columns=FULL, words=Words(prompts={"p": "find"}), prompts={"anchor": "p"})
    shown = batches.decoded(rows=2)
    k = int(batches.rows_of(0)[1])
    assert len(shown) == 2 and list(shown[1]) == ["anchor", "positive", "negative", "negative_2"]
    assert shown[1]["negative_2"][0] == row(k)["m"]
    text, tokens = shown[1]["anchor"]
    assert text == row(k)["q"] and tokens.split()[1] == str(zlib.crc32(b"find") % 1000 + 2)


def test_with_a_real_tokenizer(make):
    tokenizer = train_wordpiece([row(k)["q"] for k in range(40)], 100)
    words = Texts(tokenizer, 12, {"p": "1 2"}, include_prompt=False)
    batches = make(columns=FULL, words=words, prompts={"anchor": "p"}, data={"buckets": ((9, 9), (12, 12))}, steps=10)
    shapes = batches.shapes()
    for task, arrays in batches.iterate(0):
        assert (task, jax.tree.map(lambda leaf: Abstract(leaf.shape, leaf.dtype), arrays)) in shapes
        cut = arrays["anchor"]["mask"].all(1) & (arrays["anchor"]["ids"].shape[1] < 12)
        assert (arrays["anchor"]["pool"].sum(1) < arrays["anchor"]["mask"].sum(1)).all()
        assert not (cut & (arrays["anchor"]["ids"][:, -1] != tokenizer.token_to_id("[SEP]"))).any()
    assert batches.compilations() == 2
    assert batches.decoded(rows=1)[0]["anchor"][1].startswith("[CLS]")

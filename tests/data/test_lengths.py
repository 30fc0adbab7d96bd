"""The length index: measured once, read again, measured anew when what it depends on changes."""

import dataclasses
import json

import numpy as np
import pytest

from embedjax.config import File, Set
from embedjax.config.errors import DataError, StorageError
from embedjax.data.bad import BadRecords, stand_ins
from embedjax.data.columns import make_layout
from embedjax.data.lengths import length_index
from embedjax.data.sources import open_source

COLUMNS = {"anchor": "q", "positive": "a", "negative": "n"}


@dataclasses.dataclass
class Words:
    """Counts words in place of tokens, and the calls."""

    max_length: int = 9
    prompts: dict = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    calls: int = 0

    tokenizer = property(lambda self: self)
    to_str = lambda self: "words"

    def lengths(self, texts, prompt=None):
        self.calls += 1
        extra = len(self.prompts[prompt].split()) if prompt else 0
        return np.minimum([len(text.split()) + extra for text in texts], self.max_length).astype(np.int32)


@pytest.fixture
def index(tmp_path):
    """Writes rows of three texts to a file and measures them."""

    def measure(rows, *, words, prompts=None, share=0.5, write=True, folder=tmp_path / "lengths"):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(dict(zip("qan", row, strict=True))) + "\n" for row in rows))
        source = open_source(File(str(file)))
        bad = BadRecords(None, share=share, counts={"a/b": len(source)})
        layout = make_layout(Set(columns=COLUMNS), source)
        texts = dict.fromkeys(COLUMNS, words)
        return length_index("a/b", source, layout, texts=texts, prompts=prompts or {}, bad=bad, folder=folder, write=write)

    return measure


ROWS = [("w " * k, "w " * (k % 5 + 1), "w " * (k % 3 + 2)) for k in range(1, 20)]


def test_anchor_and_longest_document(index):
    measured = index(ROWS, words=Words())
    assert measured.dtype == np.int32
    assert measured.tolist() == [[min(k, 9), max(k % 5 + 1, k % 3 + 2)] for k in range(1, 20)]


def test_it_is_kept_and_read_again(index, tmp_path):
    words = Words()
    first = index(ROWS, words=words)
    assert words.calls == 3 and len(list((tmp_path / "lengths").iterdir())) == 1
    assert (index(ROWS, words=words) == first).all() and words.calls == 3
    for changed in (Words(max_length=4), Words(prompts={"p": "a b"}), Words(default_prompt="p")):
        index(ROWS, words=changed)
        assert changed.calls == 3
    prompted = Words(prompts={"p": "a b"})
    assert (index(ROWS, words=prompted, prompts={"anchor": "p"})[0] == [3, 3]).all() and prompted.calls == 3
    index(ROWS[:-1], words=words)
    assert words.calls == 6


def test_only_the_writer_writes(index, tmp_path):
    index(ROWS, words=Words(), write=False)
    index(ROWS, words=Words(), folder=None)
    assert not (tmp_path / "lengths").exists()


@pytest.mark.parametrize("content", [b"", b"torn", b"\x93NUMPY\x01\x00"])
def test_a_torn_file_is_made_anew(index, tmp_path, content):
    first = index(ROWS, words=Words())
    (path,) = (tmp_path / "lengths").iterdir()
    path.write_bytes(content)
    words = Words()
    assert (index(ROWS, words=words) == first).all() and words.calls == 3
    assert (np.load(path) == first).all()


def test_a_bad_row_has_the_lengths_of_its_stand_in(index):
    rows = list(ROWS)
    other = next(stand_ins(4, len(rows)))
    rows[4], rows[other] = ("", "x", "y"), ("x", "x", None)
    good = next(row for row in stand_ins(4, len(rows)) if row != other)
    for _ in range(2):  # measured, then read
        assert (index(rows, words=Words())[4] == [min(good + 1, 9), max((good + 1) % 5 + 1, (good + 1) % 3 + 2)]).all()


def test_too_many_bad_rows_stop_the_pass(index, tmp_path):
    with pytest.raises(DataError, match=r"2 of 19 rows.*rows.jsonl, row 3: column 'q' is empty"):
        index([ROWS[0], ("", "x", "y"), ("", "x", "y"), *ROWS[3:]], words=Words(), share=0.06)
    assert not (tmp_path / "lengths").exists()


def test_a_folder_that_cannot_be_written(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="length index"):
        index(ROWS, words=Words(), folder=tmp_path / "file")

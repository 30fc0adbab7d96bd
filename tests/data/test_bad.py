"""Bad rows: replaced alike everywhere, listed once, and too many of them stop the run."""

import json
import threading

import pytest

from embedjax.config.errors import DataError, StorageError
from embedjax.data.bad import BadRecords, stand_ins
from embedjax.data.sources import BadRow


def bad(*rows):
    return {row: BadRow("f.jsonl", row + 1, "column 'a' is empty") for row in rows}


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 2, 5, 7919, 10_000])
def test_stand_ins_are_other_rows(count):
    tried = list(stand_ins(0, count))
    assert len(tried) == len(set(tried)) == min(64, count - 1) and 0 not in tried
    assert all(0 <= row < count for row in tried)


def test_each_row_is_listed_once_over_restarts(tmp_path):
    path = tmp_path / "run" / "bad_records.jsonl"
    for _ in range(2):
        records = BadRecords(path, share=0.1, counts={"train": 1000})
        records.read("train", range(50), bad(3, 4))
        records.read("train", range(50), bad(3))
        assert records.count == 2
    with path.open("a") as out:
        out.write('{"file": "f.js')  # as a kill leaves it
    records = BadRecords(path, share=0.1, counts={"train": 1000})
    records.read("train", range(50), bad(4, 5))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines if line.endswith("}")] == [4, 5, 6]
    assert json.loads(lines[0]) == {"file": "f.jsonl", "row": 4, "reason": "column 'a' is empty"}


def test_threads_share_the_list(tmp_path):
    records = BadRecords(tmp_path / "bad.jsonl", share=1, counts={"train": 100})
    threads = [threading.Thread(target=lambda: [records.read("train", [k], bad(k)) for k in range(40)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["row"] for line in listed(tmp_path / "bad.jsonl")) == list(range(1, 41))


def test_more_than_the_share_of_the_whole_set_stops_at_once():
    records = BadRecords(None, share=0.02, counts={"train": 100})
    records.read("train", range(10), bad(1, 2))
    with pytest.raises(DataError, match=r"3 of 11 rows read of set 'train' are bad .*bad_share 2.0%.*f.jsonl, row 11"):
        records.read("train", [10], bad(10))


def test_a_sample_stops_the_run_only_beyond_chance():
    records = BadRecords(None, share=0.01, counts={"train": 10**6})
    records.read("train", range(199), bad(*range(9)))  # too few rows to judge
    records = BadRecords(None, share=0.01, counts={"train": 10**6})
    records.read("train", range(200), bad(*range(6)))  # 3 %, which a set of 1 % may show
    with pytest.raises(DataError, match="7 of 200"):
        records.read("train", range(200), bad(6))


def test_sets_are_judged_apart():
    records = BadRecords(None, share=0.01, counts={"a": 1000, "b": 1000})
    records.read("a", range(300), bad(*range(8)))
    records.read("b", range(300), bad(*range(8)))
    assert records.count == 16


def test_a_list_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    records = BadRecords(tmp_path / "file" / "bad.jsonl", share=1, counts={"train": 9})
    with pytest.raises(StorageError, match="bad.jsonl"):
        records.read("train", [1], bad(1))

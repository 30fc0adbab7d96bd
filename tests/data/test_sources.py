"""Every format gives the same rows in any order, from any thread, and tells what is wrong with a file or a row in one line."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from embedjax import config
from embedjax.config.errors import ConfigError, DataError, EmbedjaxError
from embedjax.data import files, records, tables
from embedjax.data.columns import make_layout, read_rows
from embedjax.data.image import decode
from embedjax.data.sources import BadRow, class_names, manifest, open_source, select, source_of

ROWS = [{"query": f'query {i} é, "x"' + "\n" * (i % 3 == 0) + "y", "doc": "w " * (i % 7), "n": i} for i in range(40)]
TEXTS = [{"query": row["query"], "doc": row["doc"], "n": str(row["n"])} for row in ROWS]


def open_file(path, **fields):
    return open_source(config.File(str(path), **fields))


def write_table(path, rows=ROWS, *, dialect="excel", mark=b"", newline="\r\n"):
    text = io.StringIO()
    writer = csv.writer(text, dialect, lineterminator=newline)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    write(path, mark + text.getvalue().encode())


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()


def make(folder, name):
    """A file of ROWS in the format that its name says."""
    path = folder / name
    match name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            write_table(path)
        case "tsv":
            write_table(path, dialect="excel-tab", newline="\n")
        case "jsonl":
            write(path, json_lines())
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
        case "arrayrecord":
            write_records(path, json_lines().splitlines())
    return path


@pytest.mark.parametrize(
    "name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrayrecord"]
)
def test_random_order_gives_the_rows_of_a_sequential_read(tmp_path, name):
    path = make(tmp_path, name)
    source = open_file(path, quotes=True if ".tsv" in name else None)
    expected = TEXTS if ".csv" in name or ".tsv" in name else ROWS
    assert len(source) == len(ROWS) and source.columns == ("query", "doc", "n") and source.name == str(path)
    for i in random.Random(0).sample(range(len(ROWS)), len(ROWS)):
        assert source[i] == source[np.int64(i)] == expected[i]
    (file,) = source.files
    assert (file.path, file.size, file.rows) == (str(path), path.stat().st_size, len(ROWS))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    facts = {
        "file": str(path),
        "bytes": file.size,
        "changed": str(path.stat().st_mtime_ns),
        "sha256": sha256,
        "rows": len(ROWS),
    }
    assert manifest(source) == [facts]
    for outside in (-1, len(ROWS)):
        with pytest.raises(IndexError):
            source[outside]


def test_lines_of_a_tsv_are_rows_and_quotes_are_characters(tmp_path):
    lines = ['5" disk\t"floppy', "x\ty", 'm\tan "n" end"', '"To be" is Hamlet\'s\t"quoted"', '"\t""', 'é "\u2028\t,"']
    source = open_file(write(tmp_path / "a.tsv", ("a\tb\r\n\n" + "\n\n".join(lines)).encode()))
    assert [source[i] for i in range(len(source))] == [dict(zip("ab", line.split("\t"), strict=True)) for line in lines]
    assert [source.where(i)[1] for i in range(3)] == [3, 5, 7]
    bare = open_file(write(tmp_path / "b.csv", b'a,"b"\n"1,"2"\n'), quotes=False)
    assert bare.columns == ("a", '"b"') and bare[0] == {"a": '"1', '"b"': '"2"'}


def test_quoted_tsv_is_read_where_asked_for(tmp_path):
    write_table(path := tmp_path / "a.tsv", dialect="excel-tab", newline="\n")
    source = open_file(path, quotes=True)
    assert [source[i] for i in range(len(source))] == TEXTS
    with pytest.raises(BadRow, match=r"1 fields, expected 3 \(query, doc, n\); where quotes hold tabs .*File.quotes"):
        open_file(path)[0]


@pytest.mark.parametrize("seed", range(30))
def test_csv_index_agrees_with_the_csv_module(tmp_path, seed):
    draw = random.Random(seed)
    pieces = ["a", "é", '"', '""', ",", "\n", "\r\n", "\n\n", '"b\nc"', '"d,""e"', ",,", " ", "\u2028", "\x0b", "\x00"]
    text = "h,i\n" + "".join(draw.choice(pieces) for _ in range(60))
    if text.replace('""', "").count('"') % 2:
        text += '"'
    path = write(tmp_path / "a.csv", text.encode())
    expected = [fields for fields in list(csv.reader(io.StringIO(text, newline="")))[1:] if fields]
    try:
        source = open_file(path)
    except DataError as e:  # a stray quote may leave one open at the end; csv itself would say nothing
        assert "never closed" in str(e) or not expected
        return
    assert len(source) == len(expected)
    for i, fields in enumerate(expected):
        if len(fields) == 2:
            assert source[i] == dict(zip("hi", fields, strict=True))
        else:
            with pytest.raises(BadRow, match="fields, expected 2"):
                source[i]


def test_byte_order_mark_blank_lines_names_and_no_last_newline(tmp_path):
    write_table(tmp_path / "mark.csv", mark=b"\xef\xbb\xbf")
    assert open_file(tmp_path / "mark.csv").columns == ("query", "doc", "n")
    assert open_file(write(tmp_path / "mark.jsonl", b'\xef\xbb\xbf{"a": 1}'))[0] == {"a": 1}
    assert open_file(write(tmp_path / "mark.txt", b"\xef\xbb\xbfone\ntwo"))[0] == {"text": "one"}
    for quoted in ("", '"'):  # with and without quotes the index is made in different ways
        source = open_file(write(tmp_path / "blank.csv", f"\r\n\na,b\n\n{quoted}1{quoted},2\r\n\r\n3,4".encode()))
        assert [source[i] for i in range(len(source))] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
        assert [source.where(i)[1] for i in range(2)] == [5, 7]
    source = open_file(write(tmp_path / "bare.tsv", b"1\t2\n3\t4\n"), names=("x", "y"))
    assert (len(source), source[0], source.where(0)) == (2, {"x": "1", "y": "2"}, (str(tmp_path / "bare.tsv"), 1))


def test_where_counts_lines_inside_quotes(tmp_path):
    source = open_file(write(tmp_path / "a.csv", b'a,b\n"1\n\n",2\n3,4\n'))
    assert [source.where(i)[1] for i in range(2)] == [2, 5]


def test_plain_text_keeps_every_line(tmp_path):
    source = open_file(write(tmp_path / "a.txt", "eins\r\n\nzwei\u2028drei\n\xe9".encode()))
    assert source.columns == ("text",)
    assert [row["text"] for row in map(source.__getitem__, range(len(source)))] == ["eins", "", "zwei\u2028drei", "é"]
    assert source.where(2) == (str(tmp_path / "a.txt"), 3)
    assert len(open_file(write(tmp_path / "b.text.gz", b"a\nb\n"), format="text")) == 2


def test_line_index_over_several_blocks(tmp_path, monkeypatch):
    data = "".join("x" * (i % 5) + "\n" for i in range(1000)).encode()
    step = 1 << 24
    path = write(tmp_path / "a.txt", b"y" * (step - 7) + data)
    source = open_file(path)
    assert len(source) == 1000 and [source[i]["text"] for i in range(1, 1000)] == ["x" * (i % 5) for i in range(1, 1000)]


def test_long_fields_are_read(tmp_path):
    text = "word " * 60_000
    assert open_file(write(tmp_path / "a.csv", f'a,b\n"{text}",2\n'.encode()))[0]["a"] == text


def test_files_of_a_pattern_follow_each_other_sorted(tmp_path):
    for name, rows in (("b", [3, 4]), ("a", [0, 1, 2]), ("c", [5])):
        write(tmp_path / f"{name}.jsonl", json_lines([{"i": i} for i in rows]))
    source = open_file(tmp_path / "*.jsonl")
    assert [source[i]["i"] for i in range(len(source))] == list(range(6))
    assert [source.where(i) for i in (2, 3, 5)] == [
        (str(tmp_path / f), n) for f, n in (("a.jsonl", 3), ("b.jsonl", 1), ("c.jsonl", 1))
    ]
    assert [(os.path.basename(f.path), f.rows) for f in source.files] == [("a.jsonl", 3), ("b.jsonl", 2), ("c.jsonl", 1)]
    write_table(tmp_path / "x.csv", [{"a": 1, "b": 2}])
    write_table(tmp_path / "y.csv", [{"b": 3, "a": 4}])
    assert open_file(tmp_path / "?.csv")[1] == {"a": "4", "b": "3"}
    write_table(tmp_path / "z.csv", [{"a": 1, "c": 2}])
    with pytest.raises(DataError, match=r"z\.csv: columns a, c; .*x\.csv has a, b"):
        open_file(tmp_path / "?.csv")


def test_parquet_nested_columns_folders_and_remote(tmp_path):
    rows = [{"q": "a", "neg": ["x", "y"], "s": {"k": [1]}}, {"q": None, "neg": [], "s": None}]
    (tmp_path / "data").mkdir()
    for n in range(2):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"train-0000{n}-of-00002.parquet")
    source = open_file(tmp_path)
    assert [source[i] for i in range(4)] == rows * 2
    assert source.where(3) == (str(tmp_path / "data" / "train-00001-of-00002.parquet"), 2)
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="holds the splits test, train"):
        open_file(tmp_path)
    assert len(open_file(tmp_path / "data" / "train-*")) == 4


def test_folder_of_several_configurations_is_refused(tmp_path):
    for name in ("de", "en"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="in the folders de, en; name one"):
        open_file(tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet", "a.arrayrecord"])
def test_urls_that_fsspec_knows(tmp_path, name):
    import fsspec

    local = open_file(make(tmp_path, name))
    with fsspec.open(f"memory://folder/{name}", "wb") as f:
        f.write((tmp_path / name).read_bytes())
    for url in (f"memory://folder/{name}", f"memory://folder/{name[0]}*{name[1:]}"):
        remote = open_file(url)
        assert [remote[i] for i in range(len(remote))] == [local[i] for i in range(len(local))]
        assert manifest(remote)[0]["sha256"] == manifest(local)[0]["sha256"]
    fsspec.filesystem("memory").rm("/folder", recursive=True)
    for missing in ("memory://none.csv", "memory://none*.csv", "nowhere://a.csv"):
        with pytest.raises(DataError, match=missing.replace("*", r"\*")):
            open_file(missing)


def test_row_group_cache_is_bounded_and_decodes_each_group_once(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.arange(1000)}), path, row_group_size=100)
    decoded = []
    part = records.Parquet(str(path), records.RowGroups(limit=3000))
    inner = part._decode
    part._decode = lambda group: decoded.append(group) or inner(group)
    assert [part[i]["a"] for i in range(1000)] == list(range(1000)) and decoded == list(range(10))
    assert (
        sorted(group for _, group in part.cache.groups) == [7, 8, 9]
        and sum(table.nbytes for table in part.cache.groups.values()) <= 3000
    )
    assert part[750] == {"a": 750} and decoded == list(range(10))
    tight = records.Parquet(str(path), records.RowGroups(limit=1))
    assert [tight[i]["a"] for i in (5, 995, 5)] == [5, 995, 5] and len(tight.cache.groups) == 1


def good_and_bad_jsonl():
    good = json.dumps({"a": "x"}).encode()
    bad = {
        b'{"a": "\xff"}': "not UTF-8: byte 0xff at byte 8",
        b'{"a": ': "malformed JSON",
        b"[1]": "JSON is list, expected an object",
        b"null": "JSON is null",
        b'{"a": "\\ud800"}': "half of a surrogate pair",
        b"[" * 100_000: "cannot be read",
        b'{"a": ' + b"9" * 5000 + b"}": "cannot be read",
        b"   ": "malformed JSON",
    }
    return good, bad


@pytest.mark.parametrize("kind", ["jsonl", "arrayrecord"])
def test_bad_json_rows_are_told_and_the_rest_is_read(tmp_path, kind):
    good, bad = good_and_bad_jsonl()
    lines = [*bad, good, b'{"a": "\\ud83d\\ude00"}']
    path = tmp_path / f"a.{kind}"
    write_records(path, lines) if kind == "arrayrecord" else write(path, b"\n".join(lines))
    source = open_file(path)
    assert source.columns == ("a",) and len(source) == len(lines)
    for i, reason in enumerate(bad.values()):
        with pytest.raises(BadRow, match=reason) as e:
            source[i]
        assert (e.value.file, e.value.row) == source.where(i) == (str(path), i + 1)
        assert "\n" not in str(e.value) and str(path) in str(e.value) and len(e.value.reason) < 200
    assert source[len(bad)] == {"a": "x"} and source[len(bad) + 1] == {"a": "😀"}


def test_bad_rows_of_tables_and_text(tmp_path):
    source = open_file(write(tmp_path / "a.csv", b"a,b\n1,2\n1\n1,2,3\n\xff,2\nx\ry,2\n5,6\n"))
    for i, reason in {1: "1 fields, expected 2 (a, b)", 2: "3 fields", 3: "not UTF-8", 4: "new-line"}.items():
        with pytest.raises(BadRow) as e:
            source[i]
        assert reason in e.value.reason and e.value.row == i + 2
    assert source[0] == {"a": "1", "b": "2"} and source[5] == {"a": "5", "b": "6"}
    text = open_file(write(tmp_path / "a.txt", b"a\n\xc3(\nb\n"))
    with pytest.raises(BadRow, match=r"a\.txt:2: not UTF-8"):
        text[1]
    assert text[2] == {"text": "b"}


def test_bad_rows_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    words = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"a": words}), path)
    source = open_file(path)
    assert source[0] == {"a": "good"}
    with pytest.raises(BadRow, match="utf-8"):
        source[1]
    pq.write_table(pa.table({"a": [f"{i * 7919} text" for i in range(4000)]}), path, row_group_size=2000, use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start + 40 : start + 2000] = b"\xff" * 1960
    path.write_bytes(data)
    source = open_file(path)
    assert source[0] == {"a": "0 text"} and source[1999] == {"a": f"{1999 * 7919} text"}
    for i in (2000, 3999):
        with pytest.raises(BadRow, match="row group 1 cannot be decoded") as e:
            source[i]
        assert e.value.row == i + 1
    assert source[5] == {"a": f"{5 * 7919} text"}


def test_corrupt_chunk_of_an_arrayrecord_is_a_bad_row(tmp_path):
    path = tmp_path / "a.arrayrecord"
    write_records(path, [json.dumps({"i": i, "t": os.urandom(500).hex()}).encode() for i in range(2000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"z" * 64
    path.write_bytes(data)
    source, good, bad = open_file(path), 0, 0
    for i in range(0, 2000, 4):
        try:
            good += source[i]["i"] == i
        except BadRow as e:
            bad += 1
            assert e.row == i + 1
    assert bad > 0 and good > 400 and good + bad == 500


def broken(folder):
    """Path -> words of the error."""
    (folder / "empty_folder.parquet").mkdir()
    make(folder, "whole.parquet"), make(folder, "whole.arrayrecord")
    parquet, array_record = (folder / "whole.parquet").read_bytes(), (folder / "whole.arrayrecord").read_bytes()
    packed = gzip.compress(b"a,b\n1,2\n" * 1000)
    contents = {
        "empty.csv": (b"", "the file is empty"),
        "empty.jsonl.gz": (b"", "corrupt or truncated gzip|the file is empty"),
        "empty.parquet": (b"", "not a readable Parquet"),
        "empty.arrayrecord": (b"", "not an ArrayRecord"),
        "blank.jsonl": (b"\n\n", "no rows"),
        "blank.csv": (b"\n\n", "no rows"),
        "mark.csv": (b"\xef\xbb\xbf", "no rows"),
        "mark.txt": (b"\xef\xbb\xbf", "no rows"),
        "header.csv": (b"a,b\n", "no rows after the header"),
        "twice.tsv": (b"a\tb\ta\n1\t2\t3\n", "names appear twice: 'a'"),
        "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        "header_bytes.csv": (b"a,\xff\n1,2\n", "header row cannot be read: not UTF-8"),
        "open_quote.csv": (b'a,b\n1,2\n"3,4\n5,6\n', "line 3 opens a quote that is never closed"),
        "no_object.jsonl": (b"[1]\n2\n", "no row is a JSON object; line 1: JSON is list"),
        "text.csv.gz": (b"a,b\n1,2\n", "gzip"),
        "cut.csv.gz": (packed[:-20], "gzip"),
        "flipped.csv.gz": (packed[:30] + b"\xff\xff\xff" + packed[33:], "gzip"),
        "garbage.parquet": (b"hello" * 100, "not a readable Parquet"),
        "cut.parquet": (parquet[: len(parquet) // 2], "not a readable Parquet"),
        "cut.arrayrecord": (array_record[: len(array_record) // 2], "truncated or not an ArrayRecord"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), folder / "norows.parquet")
    write_records(folder / "norows.arrayrecord", [])
    write_records(folder / "no_object.arrayrecord", [b"[1]"])
    return {name: words for name, (_, words) in contents.items()} | {
        "missing.csv": "no such file",
        "none*.csv": "no file matches",
        "norows.parquet": "no rows",
        "norows.arrayrecord": "no rows|empty",
        "no_object.arrayrecord": "no record is a JSON object; record 1: JSON is list",
        "empty_folder.parquet": "a folder without Parquet files",
        "whole.*": "files of the formats arrayrecord, parquet",
    }


def test_what_cannot_be_opened_is_one_line_that_names_the_file(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(DataError, match=words) as e:
            open_file(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value) and e.value.code == 3, name


def test_wrong_settings_are_config_errors(tmp_path):
    (tmp_path / "a.dat").write_bytes(b"1,2\n")
    (tmp_path / "a.csv").write_bytes(b"1,2\n")
    for path, fields, words in [
        ("a.dat", {}, "the ending tells no format"),
        ("a.dat", {"format": "csv", "names": ("x", "y", "z")}, "rows have 2 fields, but names gives 3"),
        ("a.csv", {"format": "text", "names": ("x",)}, "names is for TSV and CSV"),
        ("a.csv", {"format": "text", "quotes": False}, "quotes is for TSV and CSV"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_file(tmp_path / path, **fields)
    with pytest.raises(ConfigError, match="empty path"):
        open_source(config.File())


def test_no_room_to_unpack_is_a_storage_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.gz", b"line\n" * 100)

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", Full)
    with pytest.raises(EmbedjaxError, match="no room to unpack it") as e:
        open_file(path)
    assert e.value.code == 4


def test_a_quote_left_open_for_too_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FIELD_LIMIT", 1000)
    before = csv.field_size_limit(1000)
    try:
        with pytest.raises(DataError, match="line 2 opens a quote not closed within"):
            open_file(write(tmp_path / "a.csv", b'a,b\n"1,2\n' + b"3,4\n" * 1000 + b'"5,6\n'))
    finally:
        csv.field_size_limit(before)


def test_select_names_the_columns_found(tmp_path):
    source = open_file(make(tmp_path, "a.jsonl"))
    select(source, {"anchor": "query", "positive": "doc"}, "data.sets[0]")
    with pytest.raises(
        DataError, match=r"data\.sets\[0\]: .*a\.jsonl has no column 'qery' \(for 'anchor'\); did you mean 'query'\? found"
    ):
        select(source, {"anchor": "qery"}, "data.sets[0]")
    with pytest.raises(DataError, match="known: doc, n, query$"):
        select(source, {"anchor": "zzzz"}, "evaluate")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet", "a.arrayrecord"])
def test_eight_threads_read_the_same_rows(tmp_path, name):
    source = open_file(make(tmp_path, name))
    if name == "a.parquet":
        source.parts[0].cache.limit = 1  # every group leaves as the next one comes
    expected = [source[i] for i in range(len(source))]
    wrong, gate = [], threading.Barrier(8)

    def read(seed):
        draw = random.Random(seed)
        gate.wait()
        try:
            for _ in range(300):
                i = draw.randrange(len(source))
                if source[i] != expected[i]:
                    wrong.append(i)
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WRITE_TFDS = """
import sys
sys.modules["jax"] = None
import io
import numpy as np, tensorflow_datasets as tfds
from PIL import Image
tfds.disable_progress_bar()
F = tfds.features

class Pairs(tfds.core.GeneratorBasedBuilder):
    "Pairs."
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({
            "query": F.Text(), "doc": F.Text(), "score": np.float32, "ids": F.Tensor(shape=(None,), dtype=np.int32),
            "neg": F.Sequence(F.Text()), "image": F.Tensor(shape=(2, 2), dtype=np.uint8),
            "photo": F.Image(), "kind": F.ClassLabel(names=["sea_green", "red"])}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(20), "validation": self._generate_examples(3)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"query": f"q {i}", "doc": f"d {i} \\u00e9", "score": float(i), "ids": list(range(i % 5)),
                      "neg": [f"n{i}{j}" for j in range(i % 3)], "image": np.full((2, 2), i, np.uint8),
                      "photo": photo(i), "kind": i % 2}

def photo(i):
    out = io.BytesIO()
    Image.new("RGB", (30 + i, 20), (9 * i, 5, 5)).save(out, "JPEG")
    return io.BytesIO(out.getvalue())

for kind in sys.argv[2:]:
    Pairs(data_dir=f"{sys.argv[1]}/{kind}", file_format=kind).download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "write.py"  # tfds looks for the file that a builder is defined in
    script.write_text(WRITE_TFDS)
    command = [sys.executable, str(script), str(folder), "array_record", "parquet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("kind", ["array_record", "parquet"])
def test_tfds_without_tensorflow(prepared, kind):
    folder = prepared / kind / "pairs" / "1.0.0"
    whole = open_source(config.Tfds(str(folder)))
    columns = {"query", "doc", "score", "ids", "neg", "image", "photo", "kind"}
    assert len(whole) == 20 and set(whole.columns) == columns and len(whole.files) == 1
    seen = {}
    for i in random.Random(0).sample(range(20), 20):
        row = whole[i]
        n = int(row["score"])
        assert row["image"].tolist() == [[n, n], [n, n]] and type(row["score"]) is float
        del row["image"]
        photo = row.pop("photo")
        assert isinstance(photo, bytes) and photo[:2] == b"\xff\xd8", "a picture stays as it was encoded"
        assert decode(photo).size == (30 + n, 20) and row.pop("kind") == n % 2
        neg = [f"n{n}{j}" for j in range(n % 3)]
        assert row == {"query": f"q {n}", "doc": f"d {n} é", "score": n, "ids": list(range(n % 5)), "neg": neg}
        seen[i] = n
    assert sorted(seen.values()) == list(range(20))
    assert class_names(whole, "kind") == ("sea_green", "red") and class_names(whole, "score") == ()
    part = open_source(config.Tfds("pairs:1.0.0", "train[25%:75%]", str(prepared / kind)))
    assert len(part) == 10 and part.where(0)[1] == 6 and part.files[0].rows == 10
    assert [part[i]["score"] for i in range(10)] == [seen[i] for i in range(5, 15)]
    both = open_source(config.Tfds(str(folder), "train[:2]+validation"))
    assert len(both) == 5 and both[2]["score"] in (0, 1, 2) and [f.rows for f in both.files] == [2, 3]
    assert "tensorflow" not in sys.modules


def test_pictures_of_tfds_and_of_the_hub_are_read_for_training(prepared, tmp_path):
    """An image feature of tensorflow-datasets, and Hugging Face's {bytes, path} in Parquet, by the columns of a set; names of
    classes are known from both."""
    which = config.Set(columns={"anchor": "query", "positive": "photo"})
    tfds = open_source(config.Tfds(str(prepared / "array_record" / "pairs" / "1.0.0")))
    whole = [tfds[row] for row in range(20)]
    photos = [{"bytes": row["photo"], "path": f"{n}.jpg"} for n, row in enumerate(whole)]
    (tmp_path / "beside.jpg").write_bytes(photos[3]["bytes"])
    photos[3] = {"bytes": None, "path": "beside.jpg"}  # as datasets writes a picture that it has not embedded
    features = {"kind": {"names": ["sea_green", "red"], "_type": "ClassLabel"}, "photo": {"_type": "Image"}}
    table = pa.table({"query": [row["query"] for row in whole], "photo": photos, "kind": [row["kind"] for row in whole]})
    note = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": note}), tmp_path / "hub.parquet")
    hub = open_source(config.File(str(tmp_path / "hub.parquet")))
    for source in (tfds, hub):
        layout = make_layout(which, source, {"positive": 8})
        good, bad = read_rows(source, layout, range(20))
        assert not bad and [good[row]["anchor"] for row in range(20)] == [row["query"] for row in whole]
        for row in range(20):
            assert good[row]["positive"].encoded == whole[row]["photo"]
            least = 30 + int(whole[row]["score"]), 20
            assert good[row]["positive"].decoded.size in (least, (-(-least[0] // 2), 10))  # a JPEG may come at half its size
    assert class_names(hub, "kind") == ("sea_green", "red") and class_names(hub, "query") == ()
    pq.write_table(table.replace_schema_metadata({"huggingface": "{"}), tmp_path / "odd.parquet")
    assert class_names(open_source(config.File(str(tmp_path / "odd.parquet"))), "kind") == ()


def test_what_a_path_on_a_command_line_is(tmp_path):
    for folder, file in (("photos", "cat/1.png"), ("shards", "a-0.tar"), ("tables", "x/train.parquet"), ("empty", "notes.txt")):
        (tmp_path / folder / file).parent.mkdir(parents=True)
        (tmp_path / folder / file).write_bytes(b"")
    path = lambda name: str(tmp_path / name)
    for name, kind in (
        ("photos", config.Pictures), ("empty", config.Pictures), ("shards", config.Tar), ("tables", config.File),
        ("shards/a-0.tar", config.Tar), ("a-{000..9}.tar", config.Tar), ("a.tar.gz", config.Tar), ("a.tgz", config.Tar),
        ("tables/x/train.parquet", config.File), ("none.jsonl", config.File), ("*.csv", config.File),
    ):  # fmt: skip
        assert source_of(path(name)) == kind(path(name)), name
    assert source_of("a.tsv", ("x", "y")) == config.File("a.tsv", names=("x", "y"))
    assert source_of("gs://bucket/a.tar") == config.Tar("gs://bucket/a.tar")


def test_tfds_row_that_cannot_be_decoded():
    class Features:
        def deserialize_example_np(self, raw):
            return {"a": raw, "b": [np.float32(1)]}

    shard = records.TfdsShard("a.array_record", ("a",), {3: b"\xff", 4: b"x"}.__getitem__, Features(), skip=3, take=2)
    with pytest.raises(BadRow, match="a.array_record:4: cannot be decoded: not UTF-8"):
        shard[0]
    assert shard[1] == {"a": "x", "b": [1.0]}


def test_tfds_that_cannot_be_read(prepared):
    folder = prepared / "array_record"
    for source, words in [
        (config.Tfds(str(folder / "pairs" / "1.0.0"), "nope"), "split 'nope'.*train.*validation"),
        (config.Tfds("pairs:2.0.0", data_dir=str(folder)), "2.0.0"),
        (config.Tfds("snli", data_dir=str(folder)), "snli: not prepared in"),
        (config.Tfds("pears_and_apples", data_dir=str(folder)), "not found"),
    ]:
        with pytest.raises(DataError, match=words) as e:
            open_source(source)
        assert "\n" not in str(e.value)


def test_functions_are_opened_by_builtin(tmp_path, monkeypatch):
    from embedjax.data import builtin

    opened = {config.Functions(limit=3): open_file(make(tmp_path, "a.csv"))}
    monkeypatch.setattr(builtin, "open_functions", opened.__getitem__)
    assert open_source(config.Functions(limit=3)) is opened[config.Functions(limit=3)]


def test_imports_without_jax():
    code = """
import importlib, pathlib, sys
sys.modules["jax"] = sys.modules["tensorflow"] = None
import embedjax.data
for path in sorted(pathlib.Path(embedjax.data.__path__[0]).glob("*.py")):
    if path.stem not in ("__init__", "batches"):
        importlib.import_module(f"embedjax.data.{path.stem}")
assert "pyarrow" not in sys.modules and "fsspec" not in sys.modules and "tensorflow_datasets" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.reference
def test_real_files(data_dir):
    pairs = open_file(data_dir / "stsb_multi_mt" / "stsb-en-dev.csv.gz", names=("a", "b", "score"))
    assert len(pairs) == 1500 and all(0 <= float(pairs[i]["score"]) <= 5 for i in range(1500))
    with gzip.open(data_dir / "stsb_multi_mt" / "stsb-en-dev.csv.gz", "rt", newline="", encoding="utf-8") as f:
        assert [list(pairs[i].values()) for i in range(1500)] == list(csv.reader(f))
    queries = open_file(data_dir / "scifact" / "queries.jsonl.gz")
    assert len(queries) == 1109 and {"_id", "text"} <= set(queries.columns)
    with gzip.open(data_dir / "scifact" / "queries.jsonl.gz") as f:
        assert [queries[i] for i in range(1109)] == [json.loads(line) for line in f]
    with gzip.open(data_dir / "scifact" / "corpus_train.csv.gz", "rt", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    corpus = open_file(data_dir / "scifact" / "corpus_train.csv.gz")
    assert corpus.columns == tuple(header) and len(corpus) == len(rows) == 5183
    assert all(list(corpus[i].values()) == rows[i] for i in random.Random(0).sample(range(5183), 500))

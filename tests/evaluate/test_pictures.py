"""Pictures of any source: what each is known by and called, and their vectors, in memory and in files."""

import io
import json
import tarfile
import threading

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedjax import config as c
from embedjax import encode_images, encode_texts
from embedjax.config.errors import ConfigError, DataError
from embedjax.data import image
from embedjax.data.sources import open_source
from embedjax.evaluate import encode as encoding
from embedjax.evaluate.encode import Encoder, encode
from embedjax.evaluate.files import encode_file
from embedjax.evaluate.pictures import Stored, files_key, holds_pictures
from embedjax.sharding import make_mesh


def paths_of(folder):
    return sorted(path for path in folder.rglob("*.*") if path.suffix in (".png", ".jpg") and path.parent.name != ".hidden")


@pytest.fixture(scope="module")
def vectors(pair, pictures):
    """One a picture, in the order of their paths, each encoded alone."""
    return np.concatenate([encode(pair, [str(path)], column="document") for path in paths_of(pictures)])


def tables(folder, pictures, kind):
    """The same pictures in the same order as a source of each kind: (what to encode, its column, what they are called)."""
    paths = paths_of(pictures)
    names = [path.relative_to(pictures).as_posix() for path in paths]
    if kind == "folder":
        return pictures, None, names
    if kind in ("tsv", "jsonl"):
        near = folder / f"pictures.{kind}"
        rows = [{"id": n, "file": str(path)} for n, path in enumerate(paths)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        near.write_text(text if kind == "jsonl" else "id\tfile\n" + "".join(f"{row['id']}\t{row['file']}\n" for row in rows))
        return near, "file", list(map(str, paths))
    if kind == "tar":
        with tarfile.open(folder / "shard.tar", "w") as archive:
            for n, path in enumerate(paths):
                for name, data in ((f"{n:03}{path.suffix}", path.read_bytes()), (f"{n:03}.txt", b"a caption")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return folder / "shard.tar", None, [f"{n:03}" for n in range(len(paths))]
    structs = [{"bytes": path.read_bytes(), "path": name} for path, name in zip(paths, names, strict=True)]
    plain = kind == "parquet of bytes"
    column = [each["bytes"] for each in structs] if plain else structs
    pq.write_table(pa.table({"image": column, "caption": names}), folder / "pictures.parquet", row_group_size=5)
    return folder / "pictures.parquet", None, [f"row {n + 1}" for n in range(len(paths))] if plain else names


@pytest.mark.parametrize("kind", ["folder", "tsv", "jsonl", "tar", "parquet of bytes", "parquet of structs"])
@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_every_source_of_pictures_is_encoded(pair, pictures, vectors, tmp_path, kind, ending):
    source, column, names = tables(tmp_path, pictures, kind)
    output = tmp_path / f"out.{ending}"
    assert encode_file(pair, source, output, column=column, block=8) == 28
    if ending == "npy":
        found = np.load(output)
    else:
        table = pq.read_table(output)
        assert table.column(column or "image").to_pylist() == names
        found = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(found, vectors, atol=2e-6)
    assert not list(tmp_path.glob("*.partial*"))


def test_on_any_number_of_devices(pair, pictures, vectors, tmp_path):
    for count in (1, 2, 4, 8):
        output = tmp_path / f"{count}.npy"
        encode_file(pair, pictures, output, mesh=make_mesh(c.Mesh(), jax.devices()[:count]), block=11)
        np.testing.assert_allclose(np.load(output), vectors, atol=2e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_goes_on_after_a_kill_but_not_with_other_pictures(pair, pictures, tmp_path, monkeypatch, ending):
    whole, output = tmp_path / f"whole.{ending}", tmp_path / f"output.{ending}"
    encode_file(pair, pictures, whole, block=8)
    begun, embed = [], Encoder.embed

    def die_at(count):
        def embed_or_die(self, columns, *rest):
            begun.append(len(columns["pixels"]))
            if len(begun) > count:
                raise Killed
            return embed(self, columns, *rest)

        monkeypatch.setattr(Encoder, "embed", embed_or_die)

    die_at(2)
    with pytest.raises(Killed):
        encode_file(pair, pictures, output, block=8)
    begun.clear()
    die_at(99)
    encode_file(pair, pictures, output, block=8)
    assert begun == [8, 4] and output.read_bytes() == whole.read_bytes()

    table = tmp_path / "one.jsonl"
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    table.write_text('{"file": "a.png"}\n' * 9)
    begun.clear()
    die_at(1)
    with pytest.raises(Killed):
        encode_file(pair, table, output, block=8)
    Image.new("RGB", (21, 20), "red").save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="another encoding .other pictures"):
        encode_file(pair, table, output, block=8)


def test_a_picture_that_is_no_whole_one_is_told_with_its_row(pair, pictures, tmp_path):
    good = [str(path) for path in paths_of(pictures)]
    (tmp_path / "cut.png").write_bytes((pictures / "red" / "0.png").read_bytes()[:100])
    (tmp_path / "words.png").write_text("hello")
    output = tmp_path / "out.npy"
    for bad, reason, done in (
        ("cut.png", "column 'file': picture cannot be decoded", 16),
        ("words.png", "column 'file': picture cannot be decoded: cannot identify", 16),
        ("none.png", "column 'file': picture '.*none.png' cannot be read: No such file", 16),
        (7, "column 'file' is int, not a picture", None),  # which is told before anything is encoded
        (None, "column 'file' is missing", None),
    ):
        rows = [{"file": file} for file in [*good[:20], bad, *good[20:]]]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=f"rows.jsonl:21: {reason}"):
            encode_file(pair, tmp_path / "rows.jsonl", output, column="file", block=8)
        state = tmp_path / "out.npy.partial.json"
        assert (json.loads(state.read_text())["rows"] if state.exists() else None) == done and not output.exists()
        for part in tmp_path.glob("*.partial*"):
            part.unlink()


def test_which_tower_takes_a_column(pair, model, pictures, tmp_path):
    """Bytes and names of picture files are pictures, unless said otherwise; a model without a tower for them says so."""
    file = str(pictures / "red" / "0.png")
    (tmp_path / "mixed.jsonl").write_text(json.dumps({"text": "red cat", "image": file, "note": "red cat.jpg"}) + "\n")
    source, output = tmp_path / "mixed.jsonl", tmp_path / "out.npy"

    def encoded(model=pair, **how):
        encode_file(model, source, output, **how)
        return np.load(output)[0]

    text, picture = encode_texts(pair, ["red cat"])[0], encode_images(pair, [file])[0]
    np.testing.assert_allclose(encoded(), text, atol=1e-6)
    np.testing.assert_allclose(encoded(as_column="query"), text, atol=1e-6)
    np.testing.assert_allclose(encoded(column="image"), picture, atol=1e-6)
    np.testing.assert_allclose(encoded(as_column="image"), picture, atol=1e-6)
    np.testing.assert_allclose(encoded(as_column="document"), picture, atol=1e-6)
    named = encode(pair, ["red cat.jpg"], column="query")[0]
    np.testing.assert_allclose(encoded(column="note", as_column="text"), named, atol=1e-6)
    with pytest.raises(DataError, match="red cat.jpg' cannot be read"):
        encoded(column="note")
    for how in ({"as_column": "image"}, {"as_column": "image", "column": "image"}):
        with pytest.raises(ConfigError, match="no tower that takes pictures"):
            encoded(model, **how)
    with pytest.raises(ConfigError, match="no tower that takes pictures"):
        encode_file(model, pictures, output)
    only = {"config": c.Model({"image": pair.config.towers["image"]}), "texts": {}}
    images = type(pair)(**{**vars(pair), **only})
    np.testing.assert_allclose(encoded(images), picture, atol=1e-6)
    np.testing.assert_allclose(encode(images, [file])[0], picture, atol=1e-6)
    with pytest.raises(ConfigError, match="no tower that takes texts"):
        encoded(images, as_column="text")


def test_pictures_in_python(pair, pictures, vectors):
    """Paths, bytes, Hugging Face's structs and Pillow's pictures are the same."""
    path = paths_of(pictures)[3]
    data = path.read_bytes()
    forms = [str(path), path, data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, Image.open(path)]
    np.testing.assert_allclose(encode_images(pair, forms), np.repeat(vectors[3:4], 6, 0), atol=1e-6)
    assert encode_images(pair, []).shape == (0, 12)
    for wrong, reason in ((path.parent / "none.png", "none.png.*No such file"), (b"x", "cannot identify"), (3.5, "is float")):
        with pytest.raises(DataError, match=reason):
            encode_images(pair, [wrong])
    with pytest.raises(ConfigError, match="a list of texts or pictures"):
        encode_images(pair, str(path))


def test_no_more_pictures_are_decoded_at_once_than_threads(pair, pictures, monkeypatch):
    held, most, lock, fit = [0], [0], threading.Lock(), image.fit
    decoded = encoding.decoded

    def count(change):
        with lock:
            held[0] += change
            most[0] = max(most[0], held[0])

    monkeypatch.setattr(encoding, "decoded", lambda picture: (count(1), decoded(picture))[1])
    monkeypatch.setattr(image, "fit", lambda *rest: (fit(*rest), count(-1))[0])
    monkeypatch.setattr(encoding, "DECODERS", 3)
    encode_images(pair, paths_of(pictures) * 4)
    assert held == [0] and 1 <= most[0] <= 3


def test_equal_pictures_and_where_they_are(pictures, tmp_path, monkeypatch):
    """By path or by bytes; paths are relative to the table, or to its root; a folder may be named from where one is."""
    monkeypatch.chdir(pictures.parent)
    folder = open_source(c.Pictures(pictures.name))
    first = Stored(folder, 0, "image")
    assert first.name == "blue/0.jpg" and first.place == f"{pictures.name}/blue/0.jpg" and str(first) == first.name
    assert first.read() == (pictures / "blue" / "0.jpg").read_bytes()
    rows = [{"file": name} for name in ("red/0.png", "red/1.jpg", "red/0.png")]
    (tmp_path / "away.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(c.File(str(tmp_path / "away.jsonl"), root=str(pictures)))
    red = [Stored(source, row, "file") for row in range(3)]
    assert red[0] == red[2] != red[1] and len(set(red)) == 2 and red[1].name == "red/1.jpg"
    assert red[1].place == str(pictures / "red" / "1.jpg") and red[1].read() == (pictures / "red" / "1.jpg").read_bytes()
    data = [{"bytes": b"a", "path": "x.png"}, {"bytes": b"b", "path": "x.png"}, {"bytes": b"a", "path": None}]
    pq.write_table(pa.table({"image": data}), tmp_path / "rows.parquet")
    same = [Stored(open_source(c.File(str(tmp_path / "rows.parquet"))), row, "image") for row in range(3)]
    assert same[0] == same[2] != same[1] and same[2].name == "row 3" and same[0].place.endswith("rows.parquet: x.png")


def test_what_a_column_holds(pictures, tmp_path):
    rows = [{"a": "red.jpg", "b": "a red cat", "c": 5}, {"a": "b.txt", "b": "b.png", "c": 6}]
    (tmp_path / "rows.jsonl").write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(c.File(str(tmp_path / "rows.jsonl")))
    assert [holds_pictures(source, name) for name in "abc"] == [True, False, False]
    folder = open_source(c.Pictures(str(pictures)))
    assert holds_pictures(folder, "image") and not holds_pictures(folder, "label")


def test_the_key_of_files_follows_their_changes(pictures, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"file": "a.png"}\n{"file": "b.png"}\n')
    source = open_source(c.File(str(tmp_path / "rows.jsonl")))
    key = lambda: files_key(source, [Stored(source, row, "file") for row in range(2)])
    first = key()
    assert key() == first, "a file that is missing is no error yet"
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    second = key()
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    assert len({first, second, key()}) == 3
    pq.write_table(pa.table({"image": [b"a", b"b", b"c"]}), tmp_path / "rows.parquet")
    held = open_source(c.File(str(tmp_path / "rows.parquet")))
    rows = iter([Stored(held, row, "image") for row in range(3)])
    files_key(held, rows)
    assert len(list(rows)) == 2, "bytes are in the file, whose hash is enough"

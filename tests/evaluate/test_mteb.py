"""The adapter as mteb calls it: batches in, prompts by the task's name, similarity. mteb itself: tests/reference."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.evaluate.encode import encode
from embedjax.evaluate.mteb import MtebEncoder
from embedjax.models import lora

LORA = {"Retrieval": c.Lora(), "default": c.Lora()}


def test_texts_go_to_the_tower_and_prompt_of_their_role(two_towers, sentences):
    named = {"query": "w1 w2 ", "Toy-query": "w3 ", "STS": "w4 "}
    towers = {name: dataclasses.replace(tower, prompts=named) for name, tower in two_towers.config.towers.items()}
    texts = {name: dataclasses.replace(text, prompts=named) for name, text in two_towers.texts.items()}
    model = dataclasses.replace(two_towers, config=dataclasses.replace(two_towers.config, towers=towers), texts=texts)
    batches = [{"text": sentences[:8]}, {"text": sentences[8:10]}]
    query, document = (types.SimpleNamespace(value=role) for role in ("query", "document"))
    asked = MtebEncoder(model).encode
    said = {"hf_split": "test", "hf_subset": "default", "batch_size": 8}
    kinds = {
        (name, kind): types.SimpleNamespace(name=name, type=kind) for name in ("Toy", "Other") for kind in ("STS", "Retrieval")
    }
    for (name, kind), role, column, prompt in (
        (("Other", "Retrieval"), query, "anchor", "query"),
        (("Toy", "Retrieval"), query, "anchor", "Toy-query"),
        (("Toy", "Retrieval"), document, "positive", None),
        (("Other", "STS"), None, "anchor", "STS"),
    ):
        found = asked(batches, task_metadata=kinds[name, kind], prompt_type=role, **said)
        np.testing.assert_allclose(found, encode(model, sentences[:10], column=column, prompt=prompt), atol=1e-6)
    # An adapter named after the type goes with the prompts of its sides.
    drawn = {name: lora.init(LORA, params["encoder"], jax.random.key(5)) for name, params in model.params["towers"].items()}
    drawn = jax.tree.map(lambda x: x + 0.3, drawn)
    params = {"towers": {name: {**each, "lora": drawn[name]} for name, each in model.params["towers"].items()}}
    named = {"Retrieval-query": "w1 ", "Retrieval-document": "w2 "}
    towers = {name: dataclasses.replace(tower, prompts=named, lora=LORA) for name, tower in towers.items()}
    texts = {name: dataclasses.replace(text, prompts=named) for name, text in texts.items()}
    config = dataclasses.replace(model.config, towers=towers)
    adapted = dataclasses.replace(model, config=config, texts=texts, params=params)
    for role, column in ((query, "query"), (document, "document")):
        found = MtebEncoder(adapted).encode(batches, task_metadata=kinds["Toy", "Retrieval"], prompt_type=role, **said)
        wanted = encode(adapted, sentences[:10], column=column, task="Retrieval")
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        other = encode(adapted, sentences[:10], column=column, task="default")
        assert np.abs(found - other).max() > 1e-3
    prefix = MtebEncoder(model, dim=4).encode(batches, task_metadata=kinds["Toy", "STS"], **said)
    assert prefix.shape == (10, 4)
    np.testing.assert_allclose(np.linalg.norm(prefix, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_similarity_is_the_models(model, similarity):
    tower = dataclasses.replace(model.config.towers["text"], similarity=similarity)
    encoder = MtebEncoder(dataclasses.replace(model, config=c.Model({"text": tower})))
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    wanted = a @ b.T
    if similarity == "cosine":
        wanted = wanted / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
    np.testing.assert_allclose(encoder.similarity(a, b), wanted, atol=1e-5)
    np.testing.assert_allclose(encoder.similarity_pairwise(a, b), np.diag(wanted), atol=1e-5)
    assert float(encoder.similarity(a[0], b[1])) == pytest.approx(wanted[0, 1], abs=1e-5)

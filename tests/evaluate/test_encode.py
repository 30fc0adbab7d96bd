"""Encoding: order, equal vectors on any number of devices, few compiled shapes, padding that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, sharding
from embedjax.config.errors import ConfigError, NonFiniteError
from embedjax.evaluate import encode as module
from embedjax.evaluate.encode import Encoder, ahead, bucket, encode, fingerprint, mesh_of, plan


def one_by_one(model, texts, prompt=None):
    """Each text alone and without padding: the definition."""
    forward = jax.jit(model.embedders["text"].apply)
    columns = [model.texts["text"].encode([text], prompt=prompt) for text in texts]
    return np.concatenate([np.asarray(forward(model.params["towers"]["text"], column).pooled) for column in columns])


@pytest.fixture(scope="module")
def vectors(model, sentences):
    return encode(model, sentences)


def test_order_and_values(model, sentences, vectors):
    assert vectors.shape == (150, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:3], one_by_one(model, sentences[:3]), atol=2e-6)
    assert np.unique(vectors.round(4), axis=0).shape[0] > 140


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices(model, sentences, vectors, devices):
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:devices])
    found = encode(model, sentences[:61], mesh=mesh, tokens_per_batch=128)
    np.testing.assert_allclose(found, vectors[:61], atol=2e-6)


def test_parameters_that_are_sharded_stay_where_they_are(model, sentences, vectors):
    mesh = sharding.make_mesh(config.Mesh(fsdp=4), jax.devices())
    sharded = dataclasses.replace(model, params=sharding.put(jax.tree.map(np.asarray, model.params), mesh))
    assert mesh_of(sharded.params) == mesh
    encoder = Encoder(sharded)
    given = jax.tree.leaves(sharded.params["towers"]["text"])
    assert all(ours is theirs for ours, theirs in zip(jax.tree.leaves(encoder.params), given, strict=True))
    np.testing.assert_allclose(encode(sharded, sentences[:20]), vectors[:20], atol=2e-6)


def test_prompt_and_default_prompt(model, sentences):
    prompted = encode(model, sentences[:3], prompt="query")
    np.testing.assert_allclose(prompted, encode(model, [f"w1 w2 {text}" for text in sentences[:3]]), atol=1e-6)
    with pytest.raises(ConfigError, match="query"):
        encode(model, ["w1"], prompt="querry")


def test_prompts_left_out_of_the_pooling(model, sentences):
    texts = dataclasses.replace(model.texts["text"], include_prompt=False)
    embedder = dataclasses.replace(model.embedders["text"], include_prompt=False)
    changed = dataclasses.replace(model, texts={"text": texts}, embedders={"text": embedder})
    found = encode(changed, sentences[:3], prompt="query", mesh=sharding.make_mesh(config.Mesh(), jax.devices()[:2]))
    np.testing.assert_allclose(found, one_by_one(changed, sentences[:3], prompt="query"), atol=2e-6)
    assert np.abs(found - encode(model, sentences[:3], prompt="query")).max() > 1e-3


def test_the_column_chooses_the_tower(two_towers, model, sentences):
    queries = encode(model, sentences[:2], column="query")
    for column in ("query", "anchor"):  # a tower of queries alone meets none without their prompt
        np.testing.assert_array_equal(encode(two_towers, sentences[:2], column=column), queries)
    plain = encode(model, sentences[:2])
    np.testing.assert_array_equal(encode(model, sentences[:2], column="anchor"), plain)
    assert np.abs(queries - plain).max() > 0.1
    assert np.abs(encode(two_towers, sentences[:2], column="positive") - plain).max() > 0.1
    with pytest.raises(ConfigError, match="text"):
        encode(two_towers, ["w1"])
    for wrong, told in (("qeury", "no column 'qeury' of texts; did you mean 'query'"), ("label", "known: anchor, document")):
        with pytest.raises(ConfigError, match=told):
            encode(model, ["w1"], column=wrong)


def prompted(model, **prompts):
    """The model with these prompts for all its towers."""
    towers = {name: dataclasses.replace(tower, prompts=prompts) for name, tower in model.config.towers.items()}
    texts = {name: dataclasses.replace(each, prompts=prompts) for name, each in model.texts.items()}
    return dataclasses.replace(model, config=dataclasses.replace(model.config, towers=towers), texts=texts)


def test_a_task_has_a_prompt_for_each_side(model, two_towers, sentences):
    prompts = {"query": "w9 ", "find-query": "w1 ", "find-document": "w2 ", "ask-query": "w3 "}
    made, texts = prompted(model, **prompts), sentences[:2]
    wanted = lambda prompt: encode(made, texts, prompt=prompt)
    for column, task, prompt in (
        ("query", "find", "find-query"),
        ("anchor", "find", "find-query"),
        ("document", "find", "find-document"),
        ("positive", "find", "find-document"),
        ("query", "ask", "ask-query"),
        ("document", "ask", None),
        ("positive", "ask", None),
        ("anchor", None, None),
        ("text", "ask-query", "ask-query"),
    ):
        np.testing.assert_array_equal(encode(made, texts, column=column, task=task), wanted(prompt), err_msg=f"{column} {task}")
    with pytest.raises(ConfigError, match="no prompt and no adapter 'find'; known: .*find-query"):
        encode(made, texts, task="find")  # which side is a text?
    apart = prompted(two_towers, **prompts)
    only = dataclasses.replace(apart.config.towers["document"], prompts={})
    towers = {**apart.config.towers, "document": only}
    apart = dataclasses.replace(apart, config=dataclasses.replace(apart.config, towers=towers))
    plain = encode(two_towers, texts, column="document")
    np.testing.assert_array_equal(encode(apart, texts, column="document", task="find"), plain)
    with pytest.raises(ConfigError, match="no prompt and no adapter 'fond'; known"):
        encode(apart, texts, column="document", task="fond")


def test_progress_and_blocks(model, sentences, vectors, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 0)  # the smallest block: 256 texts
    told = []
    found = encode(model, sentences * 3, progress=lambda done, total: told.append((done, total)))
    np.testing.assert_allclose(found, np.tile(vectors, (3, 1)), atol=2e-6)
    assert told[-1] == (450, 450) and told == sorted(told) and len(told) >= 4


def test_compiled_once_for_equal_embedders(model, sentences):
    encoder = Encoder(model)
    again = Encoder(dataclasses.replace(model, embedders={"text": dataclasses.replace(model.embedders["text"])}))
    assert encoder.forward is again.forward


def test_few_shapes_full_batches():
    rng = np.random.default_rng(0)
    for devices, count in ((1, 2000), (8, 2000), (1, 3), (8, 3)):
        lengths = rng.integers(3, 250, count)
        batches = list(plan(lengths, 256, 2048, devices))
        rows = np.concatenate([rows for rows, _ in batches])
        assert sorted(rows) == list(range(count))
        assert len({shape for _, shape in batches}) <= 16
        for at, (rows, (size, length)) in enumerate(batches):
            assert size % devices == 0 and len(rows) <= size and lengths[rows].max() <= length
            assert len(rows) == size or at == len(batches) - 1
        assert len(batches[-1][0]) * 2 > batches[-1][1][0] or batches[-1][1][0] == devices
        if count == 2000:
            assert lengths.sum() > 0.85 * sum(size * length for _, (size, length) in batches)
    assert [bucket(n) for n in (1, 8, 9, 64, 65, 97)] == [8, 8, 16, 64, 96, 128]


def test_vectors_that_are_not_finite_are_told(model):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.params)
    with pytest.raises(NonFiniteError, match="finite"):
        encode(dataclasses.replace(model, params=params), ["w1"])


def test_no_texts_and_a_string(model):
    assert encode(model, []).shape == (0, 16)
    with pytest.raises(ConfigError, match="list"):
        encode(model, "w1 w2")


def test_fingerprint_changes_with_what_decides_vectors(model, two_towers):
    texts = dataclasses.replace(model.texts["text"], max_length=20)
    params = jax.tree.map(np.array, model.params)
    params["towers"]["text"]["encoder"]["tokens"]["embedding"][5, 5] += 1e-6
    others = [
        dataclasses.replace(model, texts={"text": texts}),
        dataclasses.replace(model, params=params),
        dataclasses.replace(model, embedders={"text": dataclasses.replace(model.embedders["text"], pooling="cls")}),
    ]
    assert fingerprint(model) == fingerprint(dataclasses.replace(model, params=jax.tree.map(np.asarray, model.params)))
    assert len({fingerprint(model), fingerprint(two_towers, "positive"), *map(fingerprint, others)}) == 5


def test_ahead_keeps_order_and_errors():
    def items():
        yield from range(3)
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        for item in ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2]

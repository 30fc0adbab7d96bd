"""Late interaction against sentence-transformers' MultiVectorEncoder: folders of all three kinds, vectors, scores, losses and
their gradients."""

import dataclasses
import functools
import importlib

import colbert
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config as c
from embedjax import objective, sharding
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.export import export, gate
from embedjax.load import load

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
QUERIES, DOCUMENTS = colbert.texts(6, 20, seed=1), colbert.texts(9, 40, seed=2)


def reader(folder):
    package = importlib.import_module("sentence_transformers")
    return package.MultiVectorEncoder(str(folder), device="cpu").eval()


def assert_same(model, theirs):
    """The vectors of texts, and the scores of all pairs."""
    ours = {}
    for side, texts, ask in (("query", QUERIES, theirs.encode_query), ("document", DOCUMENTS, theirs.encode_document)):
        known, ours[side] = ask(texts, convert_to_numpy=True), encode_tokens(model, texts, column=side)
        np.testing.assert_array_equal(ours[side].lengths, list(map(len, known)), err_msg=side)
        np.testing.assert_allclose(ours[side].vectors, np.concatenate(known), atol=1e-5, err_msg=side)
    known = theirs.similarity(theirs.encode_query(QUERIES), theirs.encode_document(DOCUMENTS)).numpy()
    scores, places = maxsim_topk(ours["query"], ours["document"], len(DOCUMENTS))
    np.testing.assert_allclose(scores, np.take_along_axis(known, places, 1), atol=1e-4)


FORMS = {
    "filled and attended": {},
    "filled": {"late": dataclasses.replace(colbert.LATE, attend=False)},
    "not filled": {"late": dataclasses.replace(colbert.LATE, attend=False, expand=False, skip=("the", "."))},
    "PyLate's markers": {"late": dataclasses.replace(colbert.LATE, query_marker="[Q] ", document_marker="[D] ")},
    "no markers": {"late": dataclasses.replace(colbert.LATE, query_marker="", document_marker="")},
    "prompts": {"prompts": {"query": "the ", "document": "a ", "page-query": "red "}},
    "residual": {"dense": (c.Dense(12, True, "tanh", residual=True), c.Dense(12, False, "identity", residual=True))},
}


@pytest.fixture(scope="module", params=FORMS)
def model(request, tmp_path_factory):
    return colbert.model(tmp_path_factory.mktemp("colbert"), **FORMS[request.param])


@pytest.mark.parametrize("format", ["sentence-transformers", "pylate"])
def test_it_reads_our_folders_and_we_what_it_writes(model, tmp_path, format):
    assert export(model, tmp_path / "ours", format) < 1e-6
    theirs = reader(tmp_path / "ours")
    assert_same(model, theirs)
    assert gate.check(tmp_path / "ours")["sentence-transformers"] < 1e-5
    theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    found = load(tmp_path / "theirs")
    assert_same(found, theirs)
    late, named = model.config.towers["text"].late, "page-query" in model.config.towers["text"].prompts
    known = model.texts["text"].tokenizer.token_to_id  # words that the tokenizer lacks are not written
    late = dataclasses.replace(late, skip=tuple(word for word in late.skip if known(word) is not None))
    if format == "pylate" and named:  # PyLate's named prompts have no marker before them there, and stay as they are
        late = dataclasses.replace(late, query_marker="", document_marker="")
    assert found.config.towers["text"].late == late
    assert found.config.towers["text"].dense == model.config.towers["text"].dense


def test_a_named_prompt_is_the_same(tmp_path):
    model = colbert.model(tmp_path / "tokenizer", prompts={"page-query": "red ", "page-document": "blue "})
    export(model, tmp_path / "ours")
    known = reader(tmp_path / "ours").encode_query(QUERIES, prompt_name="page-query", convert_to_numpy=True)
    found = encode_tokens(model, QUERIES, column="query", task="page")
    np.testing.assert_allclose(found.vectors, np.concatenate(known), atol=1e-5)


@pytest.mark.parametrize("arch", [functools.partial(c.Roberta, pad_id=0), c.Mpnet], ids=["roberta", "mpnet"])
@pytest.mark.parametrize("attend", [True, False])
def test_towers_that_count_positions(tmp_path, arch, attend):
    """They number the [MASK] tokens too that no other token sees."""
    arch = arch(vocab_size=256, width=16, depth=2, heads=2, mlp=32, positions=50, init_std=0.5)
    model = colbert.model(tmp_path / "tokenizer", dataclasses.replace(colbert.LATE, attend=attend), arch=arch)
    export(model, tmp_path / "ours")
    assert_same(model, reader(tmp_path / "ours"))


@pytest.mark.parametrize("attend", [True, False])
def test_stanfords_checkpoints_give_its_vectors(tmp_path, attend):
    model = colbert.model(tmp_path / "tokenizer", dataclasses.replace(colbert.LATE, attend=attend))
    folder = colbert.stanford(tmp_path / "checkpoint", model)
    theirs = reader(folder)
    assert_same(load(folder), theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    assert_same(load(tmp_path / "theirs"), theirs)


def test_a_new_model_of_its_own_is_read(tmp_path):
    """An encoder that it gives a projection of 128 numbers, with nothing filled or skipped and a prompt that is text."""
    from embedjax.models.written import write_hf

    model = colbert.model(tmp_path / "tokenizer")
    tower, params = model.config.towers["text"], model.params["towers"]["text"]
    write_hf(tmp_path / "bare", tower, params, write_tokenizer=colbert.tokenizer)
    package = importlib.import_module("sentence_transformers")
    theirs = package.MultiVectorEncoder(str(tmp_path / "bare"), device="cpu", prompts={"query": "[Q] ", "document": ""})
    theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    found = load(tmp_path / "theirs")
    late = found.config.towers["text"].late
    assert (late.expand, late.skip, late.query_marker) == (False, (), "")
    assert found.config.towers["text"].dense == (c.Dense(128, False, "identity"),)
    assert_same(found, theirs)


LOSSES = {
    "MultiVectorMultipleNegativesRankingLoss": (c.MultipleNegatives(mask_duplicates=False), {}),
    "MultiVectorDistillKLDivLoss": (c.KlDistillation(), {}),
    "MultiVectorMarginMSELoss": (c.MarginMse(), {}),
}
NEGATIVES = 2


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_its_own(tmp_path, name):
    """Of texts of several lengths with tokens that are skipped: padding and these never win."""
    model = colbert.model(tmp_path / "tokenizer")
    export(model, tmp_path / "ours")
    theirs, losses = reader(tmp_path / "ours"), importlib.import_module("sentence_transformers.multi_vector_encoder.losses")
    torch = importlib.import_module("torch")
    columns = [QUERIES, *(colbert.texts(6, 30, seed=9 + n) for n in range(1 + NEGATIVES))]
    scores = np.random.default_rng(5).normal(size=(6, 1 + NEGATIVES)).astype(np.float32)
    loss, options = LOSSES[name]
    sides = ["query", *["document"] * (1 + NEGATIVES)]
    features = [
        theirs.preprocess(column, prompt=theirs.prompts[side], task=side) for side, column in zip(sides, columns, strict=True)
    ]
    labels = None if isinstance(loss, c.MultipleNegatives) else torch.tensor(scores)
    for feature, side in zip(features, sides, strict=True):
        feature["task"] = side
    known = getattr(losses, name)(theirs, **options)(features, labels)
    known.backward()
    gradients = {
        "dense": theirs[1].linear.weight.grad.numpy().T,
        "up": theirs[0].auto_model.encoder.layer[0].intermediate.dense.weight.grad.numpy().T,
    }

    source = model.texts["text"]
    length = 24
    positive, *others = (source.of("document").encode(column, length=length) for column in columns[1:])
    batch = {"anchor": source.of("query").encode(QUERIES), "positive": positive}
    batch["negative"] = {key: np.stack([x[key] for x in others], 1) for key in positive}
    batch |= {"row": np.arange(6, dtype=np.int32), "scores": scores}
    names = ["anchor", "positive", "negative", "negative_2"]
    names += ["score", "score_2", "score_3"] * (labels is not None)
    task = c.Set(columns={key: key for key in names}, loss=loss)
    made = objective.make(task, model.config, model.embedders, sharding.make_mesh(c.Mesh(), jax.devices()[:1]))

    def value(params):
        outputs = made.encode(params, {}, batch, None)
        return made.loss(params, outputs, made.targets({}, batch), None)[0]

    found, gradient = jax.jit(jax.value_and_grad(value))(jax.tree.map(jnp.asarray, dict(model.params)))
    np.testing.assert_allclose(found, known.detach().numpy(), rtol=1e-4)
    tower = gradient["towers"]["text"]
    ours = {"dense": tower["dense"]["0"]["kernel"], "up": tower["encoder"]["blocks"]["up"]["kernel"][0]}
    for part, wanted in gradients.items():
        np.testing.assert_allclose(ours[part], wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=part)

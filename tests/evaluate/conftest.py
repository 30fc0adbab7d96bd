"""A random model of two small towers over a closed vocabulary, and texts for it."""

import dataclasses

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embedjax import config
from embedjax.data.text import Texts
from embedjax.load import Model
from embedjax.models.embedder import build_embedder

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{n}" for n in range(60)]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIALS + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def two_towers() -> Model:
    """Columns anchor and positive have towers of their own weights; both know a prompt for queries."""
    arch = config.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.3)
    prompts = {"query": "w1 w2 "}
    tower = config.Tower(arch=arch, pooling="mean", include_prompt=True, dense=(), normalize=True, prompts=prompts)
    names = ("query", "document")
    texts = Texts(word_tokenizer(), max_length=16, prompts=prompts)
    embedder = build_embedder(tower)
    return Model(
        config=config.Model(dict.fromkeys(names, tower), {"anchor": "query", "positive": "document"}),
        embedders=dict.fromkeys(names, embedder),
        params={"towers": {name: jax.jit(embedder.init)(jax.random.key(n)) for n, name in enumerate(names)}},
        texts=dict.fromkeys(names, texts),
        tokenizers={},
        origin="tiny",
    )


@pytest.fixture(scope="session")
def model(two_towers) -> Model:
    """The query tower alone, under the name text."""
    return dataclasses.replace(
        two_towers,
        config=config.Model({"text": two_towers.config.towers["query"]}),
        embedders={"text": two_towers.embedders["query"]},
        params={"towers": {"text": two_towers.params["towers"]["query"]}},
        texts={"text": two_towers.texts["query"]},
    )


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Different texts of 2 to 20 words; the longest are cut at the tower's 16 tokens."""
    rng = np.random.default_rng(0)
    return [" ".join([WORDS[n % 60], WORDS[n // 60], *rng.choice(WORDS, rng.integers(0, 19))]) for n in range(150)]

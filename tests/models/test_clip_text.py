"""Text towers of CLIP and SigLIP: what a token may see, which token is the text, and texts that are filled with padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embedjax import load
from embedjax.config import ClipText, SiglipText, Tower
from embedjax.config.errors import ConfigError
from embedjax.data.text import Texts
from embedjax.models.embedder import Embedder
from embedjax.models.families import clip_text

SMALL = {"vocab_size": 50, "width": 16, "depth": 2, "heads": 4, "mlp": 24, "positions": 9, "init_std": 0.2}
CLIP, SIGLIP = ClipText(**SMALL, pad_id=49, eos_id=49), SiglipText(**SMALL)
EMBEDDER = Embedder(CLIP, pooling="lasttoken")
MASK = np.arange(7)[None] < np.array([7, 3, 1, 5])[:, None]
RNG = np.random.default_rng(0)
IDS = np.where(MASK, RNG.integers(3, 49, MASK.shape), 49).astype(np.int32)
COLUMN = {"ids": IDS, "mask": MASK}
KEY = jnp.uint32(5)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once each and take longer to optimise than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def init(embedder):
    return jax.jit(embedder.init)(jax.random.key(0))


def of_first_tokens(arch):
    """[L L]: how the vector of token i moves with the embedding of position j; a text without padding."""
    params = init(Embedder(arch, pooling="lasttoken"))["encoder"]

    def tokens(table):
        moved = params | {"positions": {"embedding": table}}
        vectors = clip_text.Tower(arch).apply({"params": moved}, IDS[:1], MASK[:1])[0][0]
        return vectors @ jnp.arange(vectors.shape[-1], dtype=jnp.float32)  # their sum is 0: they are normalised

    jacobian = jax.jit(jax.jacrev(tokens))(params["positions"]["embedding"])
    return np.abs(jacobian).max(-1)[:, :7]


def test_clip_looks_back_and_siglip_everywhere():
    seen = of_first_tokens(CLIP)
    later = np.arange(7)[None] > np.arange(7)[:, None]
    assert (seen[later] == 0).all() and (seen[~later] > 0).all()
    assert (of_first_tokens(SIGLIP) > 0).all()


@pytest.mark.parametrize("arch", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_padding_has_no_gradient_and_no_say(arch):
    """Of a text whose mask leaves it out: SigLIP's do not."""
    embedder = Embedder(arch, pooling="lasttoken")
    params = init(embedder)
    run = jax.jit(lambda p, c: embedder.apply(p, c).pooled)
    gradient = jax.jit(jax.grad(lambda p: (embedder.apply(p, COLUMN).pooled ** 3).sum()))(params)["encoder"]["tokens"][
        "embedding"
    ]
    assert (gradient[49] == 0).all() and (np.abs(gradient[np.unique(IDS[MASK])]).max(-1) > 0).all()
    longer = {name: np.pad(x, [(0, 0), (0, 2)]) for name, x in COLUMN.items()}
    np.testing.assert_allclose(run(params, longer), run(params, COLUMN), atol=1e-6)
    filled = run(params, COLUMN | {"mask": np.ones_like(MASK)})
    assert np.abs(filled - run(params, COLUMN))[1:].max(-1).min() > 0.01
    np.testing.assert_allclose(filled[0], run(params, COLUMN)[0], atol=1e-6)


def test_layers_scanned_unrolled_and_recomputed_and_chunks_are_the_same():
    arch = dataclasses.replace(CLIP, dropout=0.2, attention_dropout=0.2)
    params = init(EMBEDDER)

    def value_and_grad(rows, **how):
        embedder, column = Embedder(arch, pooling="lasttoken", **how), {name: x[rows] for name, x in COLUMN.items()}
        loss = lambda p, column, row: (embedder.apply(p, column, row=row, key=KEY).pooled ** 3).sum()
        return jax.jit(jax.value_and_grad(loss))(params, column, jnp.arange(4)[rows])

    close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
    whole = value_and_grad(slice(None), layers="unroll")
    close(whole, value_and_grad(slice(None), layers="scan", remat=True))
    halves = [value_and_grad(slice(i, i + 2), layers="unroll") for i in (0, 2)]
    close(whole, jax.tree.map(jnp.add, *halves))


def test_a_text_too_long_is_refused():
    with pytest.raises(ConfigError, match=r"10 tokens.* 9 positions"):
        jax.eval_shape(clip_text.Tower(CLIP).init, jax.random.key(0), np.ones((1, 10), np.int32), np.ones((1, 10), bool))


# ---- texts


def words(specials: bool = True) -> Tokenizer:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, "red": 4, "cat": 5, "dog": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    if specials:
        template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        tokenizer.post_processor = template
    return tokenizer


def test_filled_texts():
    texts = Texts(words(), 6, prompts={"a": "red "}, include_prompt=False, fills=True, pad_id=0)
    column = texts.encode(["red cat", "", "cat " * 9])
    assert column["mask"].all() and column["ids"].tolist() == [[1, 4, 5, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 5, 5, 5, 5, 2]]
    assert texts.lengths(["red", "cat " * 9]).tolist() == [6, 6]
    longer = texts.encode(["cat"], length=8, prompt="a", words=True)
    assert longer["ids"].tolist() == [[1, 4, 5, 2, 0, 0, 0, 0]] and longer["mask"].tolist() == [[True] * 6 + [False] * 2]
    assert longer["pool"].tolist() == [[False] * 2 + [True] * 4 + [False] * 2]
    assert longer["word"].tolist() == [[-1, 0, 1, -1, -1, -1, -1, -1]]
    left = dataclasses.replace(texts, pad_side="left").encode(["cat"], length=8)
    assert left["ids"].tolist() == [[0, 0, 0, 0, 0, 1, 5, 2]] and left["mask"].tolist() == [[False] * 2 + [True] * 6]
    with pytest.raises(ConfigError, match="fill its max_length of 6"):
        texts.encode(["cat"], length=5)


def test_the_last_place_of_a_filled_text_is_its_vector(tmp_path):
    words().save(str(tmp_path / "tokenizer.json"))
    arch = dataclasses.replace(SIGLIP, pad_id=0)
    tower = Tower(arch=arch, pooling="lasttoken", dense=(), normalize=False, max_length=6, include_prompt=True)
    texts = load.make_texts(tower, tmp_path)
    assert (
        texts.fills
        and not load.make_texts(dataclasses.replace(tower, arch=dataclasses.replace(CLIP, eos_id=2)), tmp_path).fills
    )
    embedder = Embedder(arch, pooling="lasttoken", normalize=False)
    apply = jax.jit(lambda p, c: embedder.apply(p, c, want=("pooled", "tokens")))
    out = apply(init(embedder), texts.encode(["red cat", "dog"]))
    np.testing.assert_allclose(out.pooled, out.tokens[:, -1], atol=1e-6)


@pytest.mark.parametrize(("specials", "told"), [(True, "token 2; .*eos_id is 49"), (False, "token none")])
def test_an_end_of_text_that_others_would_not_find_is_refused(specials, told, tmp_path):
    words(specials).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=told):
        load.make_texts(Tower(arch=CLIP, max_length=6), tmp_path)

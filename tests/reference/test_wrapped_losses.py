"""Matryoshka, adaptive layers and 2D Matryoshka against sentence-transformers' on a small model: loss and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from embedjax import config, objective, sharding, step
from embedjax.models import weights, written
from embedjax.models.embedder import build_embedder

torch = pytest.importorskip("torch")
st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
B, L, D, V = 6, 5, 16, 40
ARCH = config.Bert(vocab_size=V, width=D, depth=2, heads=2, mlp=24, positions=8, init_std=0.3)
TOWER = config.Tower(
    arch=ARCH,
    pooling="mean",
    include_prompt=True,
    dense=(),
    normalize=True,
    max_length=8,
    layers="scan",
    prompts={},
    default_prompt=None,
)
MODEL, TOWERS = config.Model({"text": TOWER}), {"text": build_embedder(TOWER)}
DIMS, WEIGHTS = (16, 8, 5), (1.0, 0.5, 2.0)
RNG = np.random.default_rng(0)
SCORES = RNG.uniform(size=B).astype(np.float32)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our parameters, their model of the same weights)"""
    params = jax.device_get(jax.jit(TOWERS["text"].init)(jax.random.key(0)))

    def tokenizer(folder):
        words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, V)}}
        Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 8}'
        )

    folder = tmp_path_factory.mktemp("wrapped") / "model"
    written.write_sentence_transformers(folder, TOWER, params, write_tokenizer=tokenizer)
    model = st.SentenceTransformer(str(folder), device="cpu")
    return params, model.eval()


def text():
    mask = np.arange(L)[None] < RNG.integers(2, L + 1, (B, 1))
    return {"ids": np.where(mask, RNG.integers(2, V, (B, L)), 0).astype(np.int32), "mask": mask}


TEXTS = {"anchor": text(), "positive": text(), "negative": text()}
CASES = {
    "in-batch": (
        config.MultipleNegatives(mask_duplicates=False),
        lambda model: losses.MultipleNegativesRankingLoss(model),
        ("anchor", "positive", "negative"),
    ),
    "cosent": (config.CoSent(), lambda model: losses.CoSENTLoss(model), ("anchor", "positive")),
    "triplet": (config.Triplet(), lambda model: losses.TripletLoss(model), ("anchor", "positive", "negative")),
}
# All layers and all prefixes, so that nothing is left to chance; ours and theirs draw otherwise.
LAYERS = {"last_weight": 1.5, "prior_weight": 0.7, "kl_weight": 0.4, "kl_temperature": 0.3}
THEIRS = {"last_layer_weight": 1.5, "prior_layers_weight": 0.7, "kl_div_weight": 0.4, "kl_temperature": 0.3}
WRAPPERS = {
    "matryoshka": (
        {"matryoshka": DIMS, "matryoshka_weights": WEIGHTS},
        lambda model, loss: losses.MatryoshkaLoss(model, loss, list(DIMS), list(WEIGHTS)),
    ),
    "layers": (
        {"layers": config.Layers(0, weighting="log", **LAYERS)},
        lambda model, loss: losses.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1, layer_weighting="log", **THEIRS),
    ),
    "2d matryoshka": (
        {"matryoshka": DIMS, "matryoshka_weights": WEIGHTS, "layers": config.Layers(0, **LAYERS)},
        lambda model, loss: losses.Matryoshka2dLoss(
            model, loss, list(DIMS), list(WEIGHTS), n_layers_per_step=-1, n_dims_per_step=-1, **THEIRS
        ),
    ),
}


@pytest.mark.parametrize(
    ("case", "wrapper"), [*(("in-batch", w) for w in WRAPPERS), ("cosent", "2d matryoshka"), ("triplet", "2d matryoshka")]
)
def test_wrapper(both, case, wrapper):
    params, model = both
    loss, peer, texts = CASES[case]
    options, wrap = WRAPPERS[wrapper]
    columns = {
        **{name: TEXTS[name] for name in texts if name != "negative"},
        **({"negative": jax.tree.map(lambda x: x[:, None], TEXTS["negative"])} if "negative" in texts else {}),
        "row": np.arange(B, dtype=np.int32),
        "scores": SCORES,
    }
    names = {name: name for name in (*texts, *(("score",) if case == "cosent" else ()))}
    task = config.Set(columns=names, loss=type(loss)(**{**vars(loss), **options}))
    made = objective.make(task, MODEL, TOWERS, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))
    trained = {"towers": {"text": params}}
    (value, _), grads = jax.jit(step.plain(made))(trained, {}, columns, jnp.uint32(0))

    model.zero_grad()
    features = [
        {"input_ids": torch.tensor(TEXTS[name]["ids"]).long(), "attention_mask": torch.tensor(TEXTS[name]["mask"]).long()}
        for name in texts
    ]
    wanted = wrap(model, peer(model))(features, torch.tensor(SCORES))
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-4)
    ours = weights.to_tensors(ARCH, jax.device_get(grads["towers"]["text"]["encoder"]))
    theirs = {name: p.grad for name, p in model[0].auto_model.named_parameters() if p.grad is not None}
    compared = 0
    largest = max(float(p.abs().max()) for p in theirs.values())
    for name, p in theirs.items():
        if name in ours:
            compared += 1
            np.testing.assert_allclose(ours[name], p.numpy(), rtol=2e-3, atol=2e-5 * largest, err_msg=name)
    assert compared > 30

"""Class heads, masked language modelling and the denoising auto-encoder against torch, transformers and sentence-transformers:
values and gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding, step
from embedjax.losses import classify
from embedjax.models import weights
from embedjax.models.classifier import features
from embedjax.models.embedder import Embedder
from embedjax.models.families import family_of
from embedjax.models.noise import delete_words, hide

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402

pytestmark = pytest.mark.reference

B, L, D, V = 6, 12, 24, 61
SMALL = {"vocab_size": V, "width": D, "depth": 2, "heads": 3, "mlp": 40, "positions": 20, "init_std": 0.15}
ONE = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
KEY = jnp.uint32(5)
ROW = np.arange(B, dtype=np.int32)


def double(x):
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def close(found, wanted, name=""):
    wanted = wanted.detach().numpy()
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-4, atol=2e-4 * np.abs(wanted).max(), err_msg=name)


def test_softmax_over_a_pair_is_that_of_sentence_transformers(monkeypatch):
    rng = np.random.default_rng(0)
    u, v, labels = rng.normal(size=(B, D)), rng.normal(size=(B, D)), rng.integers(0, 3, B)
    model = torch.nn.Module()
    model.device = "cpu"
    peer = losses.SoftmaxLoss(model, D, 3).double()
    module = __import__("sys").modules[losses.SoftmaxLoss.__module__]
    leaves = [double(x) for x in (u, v)]
    monkeypatch.setattr(module, "embed_columns", lambda model, given: leaves)
    linear = peer.classifier
    value = peer.forward([{}, {}], torch.tensor(labels))
    wanted = torch.autograd.grad(value, [*leaves, linear.weight, linear.bias])
    weight, bias = (x.detach().numpy() for x in (linear.weight, linear.bias))
    loss = lambda u, v, kernel, bias: classify.cross_entropy(features(u, v) @ kernel + bias[None], labels)[0]
    with jax.enable_x64(True):
        found, grads = jax.value_and_grad(loss, (0, 1, 2, 3))(u, v, weight.T, bias)
    np.testing.assert_allclose(found, value.item(), rtol=1e-10)
    for ours, theirs in zip((grads[0], grads[1], grads[2].T, grads[3]), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_are_those_of_torch(smoothing):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(B, 4)), rng.integers(0, 4, B)
    several, w = (rng.random((B, 4)) < 0.5).astype(np.float64), (1.0, 0.5, 2.0, 3.0)
    leaf, tw = double(logits), torch.tensor(w, dtype=torch.float64)
    one = torch.nn.functional.cross_entropy(leaf, torch.tensor(labels), weight=tw, label_smoothing=smoothing)
    target = torch.tensor(several * (1 - smoothing) + smoothing / 2)
    many = torch.nn.functional.binary_cross_entropy_with_logits(leaf, target, weight=tw[None])
    with jax.enable_x64(True):
        options = {"weights": w, "smoothing": smoothing}
        found = jax.value_and_grad(lambda x: classify.cross_entropy(x, labels, **options)[0])(logits)
        found_many = jax.value_and_grad(lambda x: classify.multi_label(x, several, **options)[0])(logits)
    for (value, grad), wanted in ((found, one), (found_many, many)):
        np.testing.assert_allclose(value, wanted.item(), rtol=1e-10)
        np.testing.assert_allclose(grad, torch.autograd.grad(wanted, leaf)[0].numpy(), rtol=1e-8, atol=1e-11)


def text(arch):
    """A column of texts of many lengths, two pieces a word, between two special tokens."""
    rng = np.random.default_rng(0)
    length = np.array([12, 5, 9, 4, 12, 7])[:, None]
    place, mask = np.arange(L)[None], np.arange(L)[None] < length
    ids = np.where(mask, rng.integers(5, V - 2, (B, L)), arch.pad_id)
    word = np.where((place > 0) & (place < length - 1), (place - 1) // 2, -1)
    return {"ids": ids.astype(np.int32), "mask": mask, "word": word.astype(np.int32)}


def theirs(arch, kind, **settings):
    """A random model of transformers', biases and norms random too."""
    given = {k: v for k, v in family_of(arch).to_hf(arch).items() if k not in ("architectures", "model_type")}
    config_name = {"Bert": "BertConfig", "Roberta": "RobertaConfig", "ModernBert": "ModernBertConfig"}[type(arch).__name__]
    model_config = getattr(transformers, config_name)(**(given | settings), attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def leaf_of(tensors, name):
    value = tensors[name]
    return value.T if value.ndim == 2 and not name.endswith("embeddings.weight") else value


def run(loss, arch, column, encoder, head, pooling="mean"):
    """(value, gradients) of the objective of a set on a tower of these parameters."""
    task = config.Set(columns={"anchor": "text"}, loss=loss)
    embedder = Embedder(arch, pooling=pooling, normalize=False)
    made = objective.make(task, config.Model({"text": config.Tower(arch=arch)}), {"text": embedder}, ONE)
    params = {"towers": {"text": {"encoder": encoder}}, "loss": {task.name: head}}
    (value, _), grads = jax.jit(step.plain(made))(jax.tree.map(jnp.asarray, params), {}, {"anchor": column, "row": ROW}, KEY)
    return value, grads["towers"]["text"]["encoder"], grads["loss"][task.name]


PREDICTIONS = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
LM_HEAD = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
MODERN = ("head.dense", "head.norm", "decoder.bias")
MASKED_LANGUAGE = {  # ours -> theirs, and what they call the transform, the norm and the last bias
    "bert": (config.Bert(**SMALL), "BertForMaskedLM", PREDICTIONS),
    "roberta": (config.Roberta(**SMALL), "RobertaForMaskedLM", LM_HEAD),
    "modernbert": (config.ModernBert(**SMALL | {"heads": 2}, pad_id=0), "ModernBertForMaskedLM", MODERN),
}


@pytest.mark.parametrize("case", MASKED_LANGUAGE)
def test_masked_language_modelling_is_that_of_transformers(case):
    arch, kind, (dense, norm, bias) = MASKED_LANGUAGE[case]
    ours = {"transform/kernel": f"{dense}.weight", "transform/bias": f"{dense}.bias"}
    ours |= {"norm/scale": f"{norm}.weight", "norm/bias": f"{norm}.bias", "bias": bias}
    model, column = theirs(arch, kind), text(arch)
    # Their heads' last bias has two names, of which parameters() may give either.
    named = dict(model.named_parameters(remove_duplicate=False))
    tensors = {name: leaf.detach().numpy() for name, leaf in named.items()}
    encoder = weights.from_tensors(
        arch, {k: v for k, v in tensors.items() if k not in ours.values() and "decoder" not in k}, file=case
    )
    head: dict = {}
    for path, name in ours.items():
        if name in tensors:
            *parents, leaf = path.split("/")
            (head.setdefault(parents[0], {}) if parents else head)[leaf] = leaf_of(tensors, name)
    loss = config.MaskedLanguage(share=0.4, whole_words=True, mask_id=4)
    value, grads, of_head = run(loss, arch, column, encoder, head)

    hidden = hide(column["ids"], column["word"], ROW, KEY, share=0.4, whole_words=True, mask_id=4, vocab_size=V)
    labels = np.full((B, L), -100)
    for r in range(B):
        places = np.asarray(hidden.places)[r][np.asarray(hidden.counts)[r]]
        labels[r, places] = column["ids"][r, places]
    assert 8 < (labels >= 0).sum() < 25
    as_long = lambda x: torch.tensor(np.asarray(x)).long()
    wanted = model(as_long(hidden.ids), as_long(column["mask"]), labels=as_long(labels)).loss
    wanted.backward()
    close(value, wanted)
    found = weights.to_tensors(arch, jax.device_get(grads))
    prefix = next(name for name in named if name.endswith(next(iter(found)))).removesuffix(next(iter(found)))
    for name, grad in found.items():
        if not name.endswith("key.bias"):
            close(grad, named[prefix + name].grad, name)
    for path, name in ours.items():
        if name in named:
            *parents, leaf = path.split("/")
            grad = (of_head[parents[0]] if parents else of_head)[leaf]
            close(grad.T if leaf == "kernel" else grad, named[name].grad, name)


DECODERS = {
    "bert": (config.Bert(**SMALL), "BertModel", "BertLMHeadModel", "bert", PREDICTIONS),
    "roberta": (config.Roberta(**SMALL), "RobertaModel", "RobertaForCausalLM", "roberta", LM_HEAD),
}


class Encoder(torch.nn.Module):
    """The encoder of a sentence-transformers model, its embedding the first token's vector."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, given):
        return {"sentence_embedding": self.model(given["input_ids"], given["attention_mask"]).last_hidden_state[:, 0]}


def tie(encoder, decoder):
    """One set of parameters for both, as sentence-transformers ties them."""
    for name, parameter in encoder.named_parameters():
        parent, _, leaf = name.rpartition(".")
        if not name.startswith("pooler"):
            setattr(decoder.get_submodule(parent), leaf, parameter)


@pytest.mark.parametrize("case", DECODERS)
def test_the_denoising_auto_encoder_is_that_of_sentence_transformers(case):
    arch, kind, decoder_kind, prefix, (dense, norm, bias) = DECODERS[case]
    column = text(arch)
    encoder, decoder = theirs(arch, kind), theirs(arch, decoder_kind, is_decoder=True, add_cross_attention=True)
    tie(encoder, getattr(decoder, prefix))
    decoder.tie_weights()
    named = dict(decoder.named_parameters(remove_duplicate=False))
    tensors = {name: leaf.detach().numpy() for name, leaf in named.items()}
    params = weights.from_tensors(arch, {k: v.detach().numpy() for k, v in encoder.named_parameters()}, file=case)
    linear = lambda name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}
    scaled = lambda name: {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}
    layers = [f"{prefix}.encoder.layer.{i}.crossattention" for i in range(arch.depth)]
    stacked = lambda make, name: jax.tree.map(lambda *x: np.stack(x), *(make(f"{layer}.{name}") for layer in layers))
    cross = {
        "cross_value": stacked(linear, "self.value"),
        "cross_out": stacked(linear, "output.dense"),
        "cross_norm": stacked(scaled, "output.LayerNorm"),
    }
    head = {"transform": linear(dense), "norm": scaled(norm), "bias": tensors[bias], "decoder": {"blocks": cross}}
    value, grads, of_head = run(config.DenoisingAutoEncoder(), arch, column, params, head, pooling="cls")

    peer = losses.DenoisingAutoEncoderLoss.__new__(losses.DenoisingAutoEncoderLoss)
    torch.nn.Module.__init__(peer)
    peer.encoder, peer.decoder, peer.need_retokenization = Encoder(encoder), decoder, False
    peer.tokenizer_decoder = types.SimpleNamespace(pad_token_id=arch.pad_id)
    noisy = delete_words(column, ROW, KEY, share=0.6, pad_id=arch.pad_id)
    assert int(np.asarray(noisy["mask"]).sum()) < column["mask"].sum()
    told = lambda c: {
        "input_ids": torch.tensor(np.asarray(c["ids"])).long(),
        "attention_mask": torch.tensor(np.asarray(c["mask"])).long(),
    }
    wanted = peer.forward([told(noisy), told(column)], None)
    wanted.backward()
    close(value, wanted)
    for name, grad in weights.to_tensors(arch, jax.device_get(grads)).items():
        if not name.endswith("key.bias"):
            close(grad, dict(encoder.named_parameters())[name].grad, name)
    close(of_head["transform"]["kernel"].T, named[f"{dense}.weight"].grad, "transform")
    close(of_head["bias"], named[bias].grad, "bias")
    for i, layer in enumerate(layers):
        close(of_head["decoder"]["blocks"]["cross_value"]["kernel"][i].T, named[f"{layer}.self.value.weight"].grad, layer)
        close(of_head["decoder"]["blocks"]["cross_out"]["kernel"][i].T, named[f"{layer}.output.dense.weight"].grad, layer)
        close(of_head["decoder"]["blocks"]["cross_norm"]["scale"][i], named[f"{layer}.output.LayerNorm.weight"].grad, layer)
        assert np.abs(named[f"{layer}.self.query.weight"].grad.numpy()).max() < 1e-6  # why we have none

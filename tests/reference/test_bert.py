"""BERT and RoBERTa against transformers layer by layer, and pooling against sentence-transformers, forward and gradient.

Every family's last layer and parameter gradients are compared in test_families.py; here are the states between.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Bert, Roberta
from embedjax.models import heads, weights
from embedjax.models.families import family_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

SMALL = {"vocab_size": 61, "width": 24, "depth": 3, "heads": 3, "mlp": 40, "positions": 20, "init_std": 0.15}
CASES = {
    "bert": (Bert(**SMALL), "BertConfig", "BertModel"),
    "roberta": (Roberta(**SMALL), "RobertaConfig", "RobertaModel"),
    "bert, relu, three types": (Bert(**SMALL, activation="relu", token_types=3), "BertConfig", "BertModel"),
}
RNG = np.random.default_rng(0)
MASK = np.arange(12)[None] < np.array([12, 5, 1])[:, None]


def theirs(arch, config_name, model_name, attention):
    """A random model of theirs, biases and norms random too."""
    settings = {k: v for k, v in family_of(arch).to_hf(arch).items() if k not in ("architectures", "model_type")}
    config = getattr(transformers, config_name)(**settings, attn_implementation=attention)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def difference(ours, reference):
    """Largest difference, relative to the largest value of the reference."""
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_its_gradient(case, attention):
    arch, config_name, model_name = CASES[case]
    model = theirs(arch, config_name, model_name, attention)
    ids = np.where(MASK, RNG.integers(3, 61, MASK.shape), arch.pad_id).astype(np.int32)
    cotangent = RNG.normal(size=(4, *MASK.shape, 24)).astype(np.float32) * MASK[None, ..., None]

    out = model(torch.tensor(ids).long(), torch.tensor(MASK).long(), output_hidden_states=True)
    expected = torch.stack(out.hidden_states)
    (expected * torch.tensor(cotangent)).sum().backward()

    tensors = {name: leaf.detach().numpy() for name, leaf in model.named_parameters()}
    params = jax.tree.map(jnp.asarray, weights.from_tensors(arch, tensors, file=case))

    def loss(params):
        last, each = family_of(arch).Tower(arch).apply({"params": params}, ids, MASK, want_layers=True)
        return (each * cotangent).sum(), (last, each)

    gradient, (last, each) = jax.jit(jax.grad(loss, has_aux=True))(params)
    real = MASK[None, ..., None]
    for ours, reference in zip(each, expected.detach().numpy(), strict=True):
        assert difference(ours * real[0], reference * real[0]) < 1e-4
    np.testing.assert_array_equal(last, each[-1])
    gradients = weights.to_tensors(arch, jax.device_get(gradient))
    for name, parameter in model.named_parameters():
        reference = parameter.grad.numpy()
        if name.endswith("key.bias"):  # a constant added to a row of scores: the true gradient is 0, both hold rounding
            assert np.abs(gradients[name]).max() < 1e-4
        else:
            assert difference(gradients[name], reference) < 1e-4, name


def test_a_config_survives_the_way_there_and_back():
    for arch, *_ in CASES.values():
        family = family_of(arch)
        assert family.from_hf(family.to_hf(arch)) == arch
        assert family.from_hf(family.to_hf(dataclasses.replace(arch, dropout=0.3, activation="gelu_tanh"))).dropout == 0.3


@pytest.mark.parametrize("pooling", list(heads.POOLINGS))
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_is_that_of_sentence_transformers(pooling, side):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    module = modules.Pooling(24, pooling_mode=pooling)
    mask = MASK if side == "right" else MASK[:, ::-1]
    tokens, cotangent = (RNG.normal(size=shape).astype(np.float32) for shape in ((*mask.shape, 24), (3, 24)))
    leaf = torch.tensor(tokens, requires_grad=True)
    expected = module({"token_embeddings": leaf, "attention_mask": torch.tensor(mask.copy()).long()})["sentence_embedding"]
    (expected * torch.tensor(cotangent)).sum().backward()
    ours, pull = jax.vjp(lambda tokens: heads.pool(tokens, mask, mask, pooling), tokens)
    assert difference(ours, expected.detach().numpy()) < 1e-5
    assert difference(pull(cotangent)[0], leaf.grad.numpy()) < 1e-5

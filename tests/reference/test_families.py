"""Small random towers against transformers: forward, gradient of every parameter, and the files both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Bert, ClipText, DistilBert, ModernBert, Mpnet, Roberta, Tower
from embedjax.models import folders, weights, written
from embedjax.models.families import FAMILIES, family_of
from embedjax.models.families.mpnet import buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

SMALL = {"vocab_size": 61, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "positions": 48, "init_std": 0.15}
ARCHS = {
    "bert": Bert(**SMALL),
    "roberta": Roberta(**SMALL),
    "xlm-roberta": Roberta(**SMALL, model_type="xlm-roberta", activation="gelu_tanh"),
    "distilbert": DistilBert(**SMALL),
    "mpnet": Mpnet(**SMALL),
    "modernbert": ModernBert(**SMALL | {"depth": 4}, pad_id=0, local_window=8),
    "clip_text_model": ClipText(**SMALL, pad_id=60, eos_id=60),
}


def theirs(arch, folder):
    """A random transformers model of an architecture, saved to a folder, norms and biases random too."""
    file = folder / "config.json"
    folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(family_of(arch).to_hf(arch)))
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def batch(arch, length=40):
    rng = np.random.default_rng(0)
    lengths = np.array([length, length // 2, 5])
    mask = np.arange(length)[None] < lengths[:, None]
    ids = np.where(mask, rng.integers(3, arch.vocab_size, mask.shape), arch.pad_id)
    return ids.astype(np.int32), mask, rng.normal(size=(*mask.shape, arch.width)).astype(np.float32) * mask[..., None]


def difference(ours, reference):
    """Largest difference, relative to the largest value of the reference."""
    return np.abs(np.asarray(ours) - reference).max() / max(np.abs(reference).max(), 1e-6)


@pytest.mark.parametrize(("name", "how"), [*((name, "unroll") for name in ARCHS), ("mpnet", "scan"), ("modernbert", "scan")])
def test_forward_and_gradient_match_transformers(name, how, tmp_path):
    arch = ARCHS[name]
    model = theirs(arch, tmp_path / "hf")
    ids, mask, cotangent = batch(arch)
    expected = model(torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64))).last_hidden_state
    (expected * torch.tensor(cotangent)).sum().backward()

    read = folders.read_arch(tmp_path / "hf")
    params = weights.from_tensors(read, weights.load_tensors(tmp_path / "hf"), file=tmp_path)
    tower = family_of(read).Tower(read, layers=how)

    def loss(params):
        tokens, _ = tower.apply({"params": params}, ids, mask)
        return (tokens * cotangent).sum(), tokens

    (_, tokens), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params))
    assert difference(tokens * mask[..., None], expected.detach().numpy() * mask[..., None]) < 1e-4
    gradients = weights.to_tensors(read, jax.device_get(gradient))
    reference = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    for tensor, value in reference.items():
        # Key biases shift every score of a row alike: their gradient is rounding, on both sides.
        rounding = np.abs(value).max() < 1e-4
        assert difference(gradients[tensor], value) < 1e-4 or (rounding and np.abs(gradients[tensor]).max() < 1e-4), tensor


@pytest.mark.parametrize("name", ARCHS)
def test_written_folder_loads_in_transformers_without_missing_or_unexpected_tensors(name, tmp_path):
    arch = ARCHS[name]
    family = family_of(arch)
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(lambda key: family.Tower(arch).init(key, ids, ids > 0)["params"])(jax.random.key(1))
    tower = Tower(arch=arch, max_length=16, dense=(), prompts={}, pooling="mean", normalize=True)
    written.write_hf(tmp_path / "out", tower, {"encoder": params}, write_tokenizer=lambda folder: None)
    model, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    odd = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    assert not odd and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids, mask, _ = batch(arch)
    with torch.no_grad():
        expected = model.eval()(
            torch.tensor(ids.astype(np.int64)), torch.tensor(mask.astype(np.int64))
        ).last_hidden_state.numpy()
    tokens, _ = jax.jit(family.Tower(arch).apply)({"params": params}, ids, mask)
    assert difference(tokens * mask[..., None], expected * mask[..., None]) < 1e-4
    assert folders.read_arch(tmp_path / "out") == arch


# transformers makes no AutoModel of SigLIP's text tower: see test_image_families.py.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"siglip_text_model"}))
def test_configs_that_transformers_writes_are_read(name, tmp_path):
    """A config as transformers saves it, its own defaults and extra keys included, means the same architecture."""
    arch = dataclasses.replace(ARCHS[name], dropout=0.1, attention_dropout=0.2)
    theirs(arch, tmp_path / "hf")
    assert folders.read_arch(tmp_path / "hf") == arch


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "MPNetForMaskedLM", "ModernBertForMaskedLM"]
)
def test_prefix_and_heads_of_masked_language_models_are_known(kind, tmp_path):
    name = kind.removesuffix("ForMaskedLM").lower()
    model = getattr(transformers, kind)(theirs(ARCHS[name], tmp_path / "hf").config)
    model.save_pretrained(tmp_path / "mlm")
    arch = folders.read_arch(tmp_path / "mlm")
    params = weights.from_tensors(arch, weights.load_tensors(tmp_path / "mlm"), file=tmp_path)
    own = dict(model.named_parameters())
    prefix = family_of(arch).names.prefix
    for tensor, value in weights.to_tensors(arch, params).items():
        np.testing.assert_array_equal(value, own[prefix + tensor].detach().numpy())


def test_buckets_of_relative_positions_are_mpnets():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    place = torch.arange(600)
    expected = MPNetEncoder.relative_position_bucket(place[None] - place[:, None], num_buckets=32)
    np.testing.assert_array_equal(buckets(600, 32), expected.numpy())


def test_modernbert_in_the_older_spelling_is_read(tmp_path):
    arch = dataclasses.replace(ARCHS["modernbert"], global_theta=5e4, local_theta=2e3, global_every=2)
    config = family_of(arch).to_hf(arch)
    for key in ("layer_types", "rope_parameters"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert folders.read_arch(tmp_path) == arch
    newer = transformers.AutoConfig.from_pretrained(tmp_path)
    assert newer.rope_parameters["full_attention"]["rope_theta"] == 5e4 and newer.layer_types[1:3] == [
        "sliding_attention",
        "full_attention",
    ]

"""An adapted tower against peft's: vectors of every layer, the gradients of A and B, and what peft merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.config import Bert, Lora
from embedjax.models import lora, weights
from embedjax.models.families import family_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")]

ARCH = Bert(vocab_size=61, width=24, depth=2, heads=3, mlp=40, positions=20, init_std=0.15)
RNG = np.random.default_rng(0)
MASK = np.arange(12)[None] < np.array([12, 5, 1])[:, None]
THEIRS = {
    "blocks/attn/query/kernel": "attention.self.query",
    "blocks/attn/key/kernel": "attention.self.key",
    "blocks/attn/value/kernel": "attention.self.value",
    "blocks/attn/out/kernel": "attention.output.dense",
    "blocks/up/kernel": "intermediate.dense",
    "blocks/down/kernel": "output.dense",
}
CASES = {
    "query and value": (Lora(3, 6.0), ["query", "value"], ("attn/query", "attn/value")),
    "every kernel": (Lora(2, 5.0, "blocks/"), "all-linear", ("",)),
}


def place(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("case", CASES)
def test_an_adapted_tower_is_pefts(case):
    adapter, targets, wanted = CASES[case]
    settings = {k: v for k, v in family_of(ARCH).to_hf(ARCH).items() if k not in ("architectures", "model_type")}
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**settings), add_pooling_layer=False)
    tensors = {name: p.detach().numpy().copy() for name, p in base.named_parameters()}
    encoder = jax.tree.map(jnp.asarray, weights.from_tensors(ARCH, tensors, file=case))
    chosen = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets)
    model = peft.get_peft_model(base, chosen).eval()
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    pairs = lora.init({"x": adapter}, encoder, jax.random.key(0))
    paths = [path for path in THEIRS if any(part in path for part in wanted)]
    assert len(trained) == 2 * ARCH.depth * len(paths) == ARCH.depth * len(jax.tree.leaves(pairs))
    with torch.no_grad():
        for name, p in trained.items():
            if ".lora_A." in name:  # theirs begins as ours does
                assert 0.5 < p.abs().max() * p.shape[1] ** 0.5 <= 1
            p.copy_(torch.tensor(RNG.normal(size=p.shape) * 0.3))

    theirs = lambda path, part, layer: named[
        f"base_model.model.encoder.layer.{layer}.{THEIRS[path]}.lora_{part}.default.weight"
    ]
    for path in paths:
        pair = place(pairs["x"], path)
        for ours, part in (("a", "A"), ("b", "B")):
            found = np.stack([theirs(path, part, layer).detach().numpy().T for layer in range(ARCH.depth)])
            assert found.shape == pair[ours].shape
            pair[ours] = jnp.asarray(found)

    ids = np.where(MASK, RNG.integers(3, 61, MASK.shape), 0).astype(np.int32)
    cotangent = RNG.normal(size=(*MASK.shape, 24)).astype(np.float32) * MASK[..., None]
    expected = model(torch.tensor(ids).long(), torch.tensor(MASK).long()).last_hidden_state
    (expected * torch.tensor(cotangent)).sum().backward()

    def loss(pairs):
        params = lora.merged({"encoder": encoder, "lora": pairs}, {"x": adapter}, "x")
        last, _ = family_of(ARCH).Tower(ARCH).apply({"params": params["encoder"]}, ids, MASK)
        return (last * cotangent).sum(), (last, params)

    grads, (last, merged) = jax.jit(jax.grad(loss, has_aux=True))(pairs)
    real = MASK[..., None]
    np.testing.assert_allclose(last * real, expected.detach().numpy() * real, atol=2e-5)
    for path in paths:
        for ours, part in (("a", "A"), ("b", "B")):
            wanted = np.stack([theirs(path, part, layer).grad.numpy().T for layer in range(ARCH.depth)])
            found = place(grads["x"], path)[ours]
            np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()), err_msg=f"{path} {part}")
    tensors = weights.to_tensors(ARCH, jax.device_get(merged["encoder"]))
    for name, p in model.merge_and_unload().named_parameters():
        np.testing.assert_allclose(tensors[name], p.detach().numpy(), atol=1e-5, err_msg=name)

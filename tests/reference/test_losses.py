"""In-batch losses against sentence-transformers' and plain torch ones: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.losses import compose, contrastive
from embedjax.losses.contrastive import Guide, Pairs, Rule

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402

pytestmark = pytest.mark.reference

B, D = 12, 16
JOINT = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# Ours -> theirs.
HARDNESS = {"none": None, "in_batch": "in_batch_negatives", "hard": "hard_negatives", "all": "all_negatives"}
DIRECTIONS = {
    "softmax": {"directions": ("query_to_doc",)},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "joint": {"directions": JOINT, "partition_mode": "joint"},
}


class Nothing(torch.nn.Module):
    """Stands where a model is asked for; the losses here are given embeddings."""


def vectors(negatives, seed=0):
    rng = np.random.default_rng(seed)
    anchor, candidates = rng.normal(size=(B, D)), rng.normal(size=(B, 1 + negatives, D))
    candidates[:, 0] += 0.5 * anchor
    return anchor, candidates


def ours(loss, anchor, candidates, *numbers):
    with jax.enable_x64(True):
        wrt = tuple(range(2 + len(numbers)))
        value, grads = jax.value_and_grad(lambda a, c, *n: loss(Pairs(a, c), *n)[0], wrt)(
            anchor, candidates, *map(jnp.float64, numbers)
        )
    return float(value), [np.asarray(g) for g in grads]


def theirs(loss, anchor, candidates, *numbers):
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (anchor, candidates, *numbers)]
    value = loss(*leaves)
    return value.item(), [g.numpy() for g in torch.autograd.grad(value, leaves)]


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-10)
    for x, y in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("criterion", DIRECTIONS)
def test_multiple_negatives_ranking(criterion, negatives, hardness):
    anchor, candidates = vectors(negatives)
    strength = 0.0 if hardness == "none" else 5.0
    peer = losses.MultipleNegativesRankingLoss(
        Nothing(), scale=20.0, hardness_mode=HARDNESS[hardness], hardness_strength=strength, **DIRECTIONS[criterion]
    )
    wanted = theirs(lambda a, c: peer.compute_loss_from_embeddings([a, *c.unbind(1)], None), anchor, candidates)
    rule = Rule(criterion, hardness, strength)
    assert_same(ours(lambda pairs: contrastive.loss(pairs, rule, 20.0), anchor, candidates), wanted)


def test_matryoshka():
    anchor, candidates = vectors(1)
    peer = losses.MultipleNegativesRankingLoss(Nothing(), scale=20.0)
    dims, weights = (16, 8, 4), (1.0, 0.5, 2.0)

    def summed(a, c):
        cut = lambda d: [torch.nn.functional.normalize(x[..., :d], dim=-1) for x in (a, *c.unbind(1))]
        return sum(w * peer.compute_loss_from_embeddings(cut(d), None) for d, w in zip(dims, weights, strict=True))

    loss = compose.matryoshka(contrastive.loss, dims, weights)
    found = ours(lambda pairs: loss(pairs, Rule(), 20.0), anchor, candidates)
    assert_same(found, theirs(summed, anchor, candidates))


@pytest.mark.parametrize(("kind", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.1)])
@pytest.mark.parametrize("negatives", [0, 1])
def test_gist_embed(monkeypatch, kind, margin, negatives):
    anchor, candidates = vectors(negatives)
    guide = vectors(negatives, seed=3)
    peer = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    torch.nn.Module.__init__(peer)
    chosen = {"temperature": 0.05, "margin_strategy": kind, "margin": margin, "must_retokenize": False}
    chosen |= {"contrast_anchors": False, "contrast_positives": False, "gather_across_devices": False, "guide": None}
    for name, value in chosen.items():
        setattr(peer, name, value)
    peer.model, peer.similarity_fct = Nothing(), torch.nn.CosineSimilarity(dim=-1)
    peer.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    module = __import__("sys").modules[losses.GISTEmbedLoss.__module__]
    told = [torch.tensor(x) for x in (guide[0], *np.moveaxis(guide[1], 1, 0))]
    given = {}
    monkeypatch.setattr(module, "embed_columns", lambda model, features: told if model is None else given["now"])

    def masked(a, c):
        given["now"] = [a, *c.unbind(1)]
        return peer.forward([{} for _ in given["now"]], None)

    rule = Rule(margin=margin, margin_kind=kind)
    found = ours(lambda pairs: contrastive.loss(pairs._replace(guide=Guide(*guide)), rule, 20.0), anchor, candidates)
    assert_same(found, theirs(masked, anchor, candidates))


def test_clip():
    anchor, candidates = vectors(0)

    def clip(a, c, scale):
        a, c = (torch.nn.functional.normalize(x, dim=-1) for x in (a, c[:, 0]))
        logits, labels = scale.exp() * a @ c.T, torch.arange(B)
        cross = torch.nn.functional.cross_entropy
        return (cross(logits, labels) + cross(logits.T, labels)) / 2

    loss = lambda pairs, scale: contrastive.loss(pairs, Rule("symmetric"), jnp.exp(scale))
    found = ours(loss, anchor, candidates, np.log(1 / 0.07))
    assert_same(found, theirs(clip, anchor, candidates, np.log(1 / 0.07)))


def test_siglip():
    anchor, candidates = vectors(0)

    def siglip(a, c, scale, bias):
        a, c = (torch.nn.functional.normalize(x, dim=-1) for x in (a, c[:, 0]))
        logits = scale.exp() * a @ c.T + bias
        labels = 2 * torch.eye(B, dtype=logits.dtype) - 1
        return -torch.nn.functional.logsigmoid(labels * logits).sum() / B

    loss = lambda pairs, scale, bias: contrastive.loss(pairs, Rule("sigmoid"), jnp.exp(scale), bias)
    found = ours(loss, anchor, candidates, np.log(10.0), -10.0)
    assert_same(found, theirs(siglip, anchor, candidates, np.log(10.0), -10.0))

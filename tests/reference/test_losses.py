"""In-batch losses against sentence-transformers' and plain torch ones: values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from embedjax.losses import compose, contrastive
from embedjax.losses.contrastive import Guide, Pairs, Rule

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

pytestmark = pytest.mark.reference

B, D = 12, 16
# Ours -> theirs.
HARDNESS = {"none": None, "in_batch": "in_batch_negatives", "hard": "hard_negatives", "all": "all_negatives"}
DIRECTIONS = {"q2d": "query_to_doc", "d2q": "doc_to_query", "q2q": "query_to_query", "d2d": "doc_to_doc"}
OTHERS = [few for count in range(4) for few in itertools.combinations(("d2q", "q2q", "d2d"), count)]
PARTITIONS = [(("q2d", *few), "joint") for few in OTHERS] + [(("q2d", *few), "per_direction") for few in ((), ("d2q",))]
CLIP = {"directions": ("q2d", "d2q"), "partition": "per_direction"}


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
@pytest.mark.parametrize(("directions", "partition"), PARTITIONS)
def test_multiple_negatives_ranking(directions, partition, negatives, hardness):
    anchor, candidates = vectors(negatives)
    strength = 0.0 if hardness == "none" else 5.0
    chosen = {"directions": tuple(DIRECTIONS[name] for name in directions), "partition_mode": partition}
    peer = losses.MultipleNegativesRankingLoss(
        Nothing(), scale=20.0, hardness_mode=HARDNESS[hardness], hardness_strength=strength, **chosen
    )
    wanted = theirs(lambda a, c: peer.compute_loss_from_embeddings([a, *c.unbind(1)], None), anchor, candidates)
    rule = Rule(directions=directions, partition=partition, hardness=hardness, strength=strength)
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


GIST = {
    "their defaults": ({}, {}),
    "anchors alone": ({"contrast_positives": False}, {"directions": ("q2d", "q2q")}),
    "positives alone": ({"contrast_anchors": False}, {"directions": ("q2d", "p2p")}),
    "neither": ({"contrast_anchors": False, "contrast_positives": False}, {"directions": ("q2d",)}),
    "margin": ({"margin": 0.2}, {"margin": 0.2}),
    "relative margin": ({"margin_strategy": "relative", "margin": 0.1}, {"margin_kind": "relative", "margin": 0.1}),
}


@pytest.mark.parametrize("case", GIST)
@pytest.mark.parametrize("negatives", [0, 1])
def test_gist_embed(monkeypatch, case, negatives):
    anchor, candidates = vectors(negatives)
    guide = vectors(negatives, seed=3)
    student, wise = Nothing(), Nothing()
    for model in (student, wise):
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))
        model.max_seq_length = 8
    peer = losses.GISTEmbedLoss(student, wise, **GIST[case][0])
    module = __import__("sys").modules[losses.GISTEmbedLoss.__module__]
    told = [torch.tensor(x) for x in (guide[0], *np.moveaxis(guide[1], 1, 0))]
    given = {}
    monkeypatch.setattr(module, "embed_columns", lambda model, features: told if model is wise else given["now"])

    def masked(a, c):
        given["now"] = [a, *c.unbind(1)]
        return peer.forward([{} for _ in given["now"]], None)

    rule = Rule(**{"directions": ("q2d", "q2q", "p2p"), **GIST[case][1]})
    found = ours(lambda pairs: contrastive.loss(pairs._replace(guide=Guide(*guide)), rule, 100.0), anchor, candidates)
    assert_same(found, theirs(masked, anchor, candidates))


def test_clip():
    anchor, candidates = vectors(0)

    def clip(a, c, scale):
        a, c = (torch.nn.functional.normalize(x, dim=-1) for x in (a, c[:, 0]))
        logits, labels = scale.exp() * a @ c.T, torch.arange(B)
        cross = torch.nn.functional.cross_entropy
        return (cross(logits, labels) + cross(logits.T, labels)) / 2

    loss = lambda pairs, scale: contrastive.loss(pairs, Rule(**CLIP), jnp.exp(scale))
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

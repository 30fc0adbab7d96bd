"""Batches of random vectors, and the comparison of one form of a loss with the dense definition in float64."""

import jax
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.losses import compose, contrastive
from embedjax.losses.contrastive import Guide, Hashes, Pairs
from embedjax.models.embedder import Embedder

B, D = 16, 24
PREFIXES = (4, 8, 12, 16, 24)
WEIGHTS = (1.0, 0.5, 2.0, 1.0, 0.25)
CRITERIA = {
    "softmax": {},
    "symmetric": {"directions": ("q2d", "d2q"), "partition": "per_direction"},
    "joint": {"directions": ("q2d", "d2q", "q2q", "d2d")},
    "gist": {"directions": ("q2d", "q2q", "p2p")},
    "sigmoid": {},
}
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}


@pytest.fixture(scope="session")
def make_pairs():
    """`make(negatives, duplicates=, guide=, seed=)` -> Pairs in float64; without duplicates every text is another one."""

    def make(negatives, *, duplicates=False, guide=False, seed=0):
        rng = np.random.default_rng(seed)
        anchor, candidates = rng.normal(size=(B, D)), rng.normal(size=(B, 1 + negatives, D))
        candidates[:, 0] += 0.3 * anchor
        # Few distinct words, so that equal anchors, positives and negatives all occur.
        few, count = rng.integers(0, 12, (B, 2 + negatives)), np.arange(B * (2 + negatives)).reshape(B, -1)
        words = np.stack([few if duplicates else count, np.full((B, 2 + negatives), 7)], -1).astype(np.uint32)
        vectors = Guide(rng.normal(size=(B, 5)), rng.normal(size=(B, 1 + negatives, 5))) if guide else None
        return Pairs(anchor, candidates, Hashes(words[:, 0], words[:, 1:]), vectors)

    return make


class Comparison:
    """One compiled form of a loss; called with pairs it returns the relative errors of value and gradients."""

    def __init__(self, loss, devices, dtype, similarity="cosine"):
        arch = config.Bert(vocab_size=8, width=D, depth=1, heads=1, mlp=4, positions=4)
        model = config.Model({"text": config.Tower(arch=arch, similarity=similarity)})
        embedders = {"text": Embedder(arch)}
        self.loss, self.dtype, self.similarity = loss, dtype, similarity
        self.mesh = sharding.make_mesh(config.Mesh(*MESHES[devices]), jax.devices()[:devices])
        task = config.Set(columns={"anchor": "a", "positive": "b"}, loss=loss)
        made = objective.make(task, model, embedders, self.mesh)

        def value(params, vectors, targets):
            return made.loss(params, dict(zip(("anchor", "positive"), vectors, strict=True)), targets, None)[0]

        initial = objective.loss_params(task, model, embedders, jax.random.key(0))
        self.initial = {name: np.asarray(x) for name, x in initial.items()}
        self.both = jax.jit(jax.value_and_grad(value, (0, 1)))

    def arguments(self, pairs):
        params = {"loss": {name: np.asarray(x, self.dtype) for name, x in self.initial.items()}}
        vectors = jax.tree.map(lambda x: np.asarray(x, self.dtype), (pairs.anchor, pairs.candidates))
        return params, *jax.device_put((vectors, (pairs.hashes, pairs.guide)), sharding.rows(self.mesh))

    def lowered(self, pairs):
        return self.both.lower(*self.arguments(pairs))

    def __call__(self, pairs):
        with jax.enable_x64(True):
            wanted = self.reference(pairs)
        with jax.enable_x64(self.dtype == np.float64):
            found = jax.device_get(self.both(*self.arguments(pairs)))
        assert all(np.asarray(x).dtype == self.dtype for x in jax.tree.leaves(found))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        error = lambda x, y: np.linalg.norm(np.asarray(x, np.float64) - y) / max(np.linalg.norm(y), 1e-30)
        return max(error(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))

    def reference(self, pairs):
        """Value and gradients of the definition in float64, eagerly."""
        loss = self.loss
        margin, kind, similarity = loss.guide_margin, loss.guide_margin_kind, self.similarity
        rule = contrastive.Rule("sigmoid", margin=margin, margin_kind=kind, similarity=similarity)
        if isinstance(loss, config.MultipleNegatives):
            what = loss.directions, loss.partition, loss.hardness, loss.hardness_strength
            rule = contrastive.Rule("softmax", *what, margin, kind, similarity)
        whole = contrastive.loss
        if loss.matryoshka:
            whole = compose.matryoshka(whole, loss.matryoshka, loss.matryoshka_weights)

        def value(params, vectors):
            learned = params["loss"]
            on_cosines = 10.0 if isinstance(loss, config.Siglip) else 20.0
            fixed = loss.scale or (on_cosines if self.similarity == "cosine" else 1.0)
            scale = jax.numpy.exp(learned["scale"]) if loss.learn_scale else fixed
            return whole(pairs._replace(anchor=vectors[0], candidates=vectors[1]), rule, scale, learned.get("bias", 0.0))[0]

        params = {"loss": {name: np.asarray(x, np.float64) for name, x in self.initial.items()}}
        return jax.device_get(jax.value_and_grad(value, (0, 1))(params, (pairs.anchor, pairs.candidates)))


@pytest.fixture(scope="session")
def compare():
    """`compare(criterion, form, devices, dtype, similarity, **options)` -> Comparison; tiles are smaller than the batch, and
    ragged."""

    def make(criterion, form, devices, dtype=np.float64, similarity="cosine", **options):
        kind = config.Siglip if criterion == "sigmoid" else config.MultipleNegatives
        return Comparison(kind(form=form, **{"tile": 3, **CRITERIA[criterion], **options}), devices, dtype, similarity)

    return make


@pytest.fixture(scope="session")
def prefixes():
    return {"matryoshka": PREFIXES, "matryoshka_weights": WEIGHTS}

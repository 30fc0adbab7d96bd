"""Losses of pairs, triplets and distillation against their namesakes in sentence-transformers: values and gradients."""

import jax
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.losses import compose, distill, pairwise, triplet
from embedjax.models.embedder import Embedder

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score, pairwise_cos_sim, pairwise_dot_score  # noqa: E402

pytestmark = pytest.mark.reference

B, D = 12, 9
PAIR_DISTANCES = {
    "cosine": losses.SiameseDistanceMetric.COSINE_DISTANCE,
    "euclidean": losses.SiameseDistanceMetric.EUCLIDEAN,
    "manhattan": losses.SiameseDistanceMetric.MANHATTAN,
}
TRIPLET_DISTANCES = {
    "cosine": losses.TripletDistanceMetric.COSINE,
    "euclidean": losses.TripletDistanceMetric.EUCLIDEAN,
    "manhattan": losses.TripletDistanceMetric.MANHATTAN,
}
MATRICES = {
    "cosine": losses.BatchHardTripletLossDistanceFunction.cosine_distance,
    "euclidean": losses.BatchHardTripletLossDistanceFunction.euclidean_distance,
}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, B, D))
Y = Y + 0.7 * X
NEGATIVES = RNG.normal(size=(3, B, D)) + 0.3 * X
SCORES = RNG.uniform(size=(B, 4)).round(1)  # some are equal
LABELS = (RNG.uniform(size=B) < 0.5).astype(np.int32)
CLASSES = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4], np.int32)  # one of them has a single text


class Nothing(torch.nn.Module):
    """Stands where a model is asked for; the losses here are given embeddings."""


def check(ours, *cases):
    """`ours(targets, *vectors)`, compiled once, against each case: (theirs(list of tensors, targets), targets, vectors)."""
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(ours, tuple(range(1, 1 + len(cases[0][2])))))
        for theirs, targets, vectors in cases:
            value, grads = both(targets, *vectors)
            leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in vectors]
            wanted = theirs(leaves, None if targets is None else torch.tensor(targets))
            np.testing.assert_allclose(value, wanted.item(), rtol=1e-9)
            for found, known in zip(grads, torch.autograd.grad(wanted, leaves), strict=True):
                np.testing.assert_allclose(found, known.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", PAIR_DISTANCES)
def test_contrastive_and_online_contrastive(kind):
    margin = {"cosine": 0.5, "euclidean": 4.0, "manhattan": 9.0}[kind]
    for peer, loss in (
        (losses.ContrastiveLoss, pairwise.contrastive),
        (losses.OnlineContrastiveLoss, pairwise.online_contrastive),
    ):
        theirs = peer(Nothing(), PAIR_DISTANCES[kind], margin).compute_loss_from_embeddings
        labels = (LABELS, np.zeros_like(LABELS), np.ones_like(LABELS))
        check(lambda told, x, y, loss=loss: loss(x, y, told, kind, margin), *[(theirs, told, (X, Y)) for told in labels])


def test_cosine_regression():
    peer = losses.CosineSimilarityLoss(Nothing())
    theirs = lambda vectors, scores: peer.loss_fct(torch.cosine_similarity(*vectors), scores)
    check(lambda told, x, y: pairwise.regression(x, y, told, "cosine"), (theirs, SCORES[:, 0], (X, Y)))


@pytest.mark.parametrize(("kind", "function"), [("cosine", pairwise_cos_sim), ("dot", pairwise_dot_score)])
def test_cosent(kind, function):
    theirs = losses.CoSENTLoss(Nothing(), scale=20.0, similarity_fct=function).compute_loss_from_embeddings
    ours = lambda told, x, y: pairwise.cosent(x, y, told, 20.0, kind)
    check(ours, *[(theirs, told, (X, Y)) for told in (SCORES[:, 0], np.ones(B))])


@pytest.mark.parametrize("width", [D, D - 1], ids=["odd", "even"])
def test_angle(width):
    theirs = losses.AnglELoss(Nothing(), scale=20.0).compute_loss_from_embeddings
    ours = lambda told, x, y: pairwise.angle(x, y, told, 20.0)
    check(ours, (theirs, SCORES[:, 0], (X[:, :width], Y[:, :width])))


@pytest.mark.parametrize("kind", TRIPLET_DISTANCES)
def test_triplet(kind):
    margin = {"cosine": 0.3, "euclidean": 1.0, "manhattan": 2.0}[kind]
    theirs = losses.TripletLoss(Nothing(), TRIPLET_DISTANCES[kind], margin).compute_loss_from_embeddings
    ours = lambda _, x, y, n: triplet.triplet(x, y, n[:, None], kind, margin)
    check(ours, (theirs, None, (X, Y, NEGATIVES[0])))


MINED = {
    "hard": (losses.BatchHardTripletLoss, triplet.batch_hard),
    "all": (losses.BatchAllTripletLoss, triplet.batch_all),
    "semi-hard": (losses.BatchSemiHardTripletLoss, triplet.batch_semi_hard),
    "hard, soft margin": (losses.BatchHardSoftMarginTripletLoss, triplet.batch_hard_soft_margin),
}


# The margins leave some triplets at zero, but not all.
@pytest.mark.parametrize(("kind", "margin"), [("cosine", 0.2), ("euclidean", 0.5)])
@pytest.mark.parametrize("case", MINED)
def test_triplets_of_a_batch(case, kind, margin):
    peer, loss = MINED[case]
    margins = () if "soft" in case else (margin,)
    theirs = peer(Nothing(), MATRICES[kind], *margins).compute_loss_from_embeddings
    ours = lambda told, x: loss(triplet.distances(x, kind), told, *margins)
    check(ours, *[(theirs, told, (X,)) for told in (CLASSES, np.zeros(B, np.int32), np.arange(B, dtype=np.int32))])


def test_mega_batch_margin():
    peer = losses.MegaBatchMarginLoss(Nothing(), use_mini_batched_version=False)
    ours = lambda _, x, y: triplet.mega_batch_margin(x, y, 0.8, 0.3)
    check(ours, (lambda vectors, _: peer.calculate_loss([[x] for x in vectors]), None, (X, Y)))


@pytest.mark.parametrize("kind", ["mse", "l2", "cosine"])
def test_distillation_of_vectors(kind):
    peer = losses.MSELoss(Nothing()) if kind == "mse" else losses.EmbedDistillLoss(Nothing(), kind)
    taught = RNG.normal(size=(B, D))
    both = lambda vectors, labels: peer.compute_loss_from_embeddings(vectors, [labels, labels])
    ours = lambda told, x, y: distill.vectors(jax.numpy.stack([x, y], 1), told[:, None], kind)
    check(ours, (both, taught, (X, Y)))


@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize(("kind", "function"), [("cosine", pairwise_cos_sim), ("dot", pairwise_dot_score)])
def test_margin_mse(kind, function, columns):
    theirs = losses.MarginMSELoss(Nothing(), function).compute_loss_from_embeddings
    ours = lambda told, x, *c: distill.margin_mse(distill.scores(x, jax.numpy.stack(c, 1), kind), told)
    check(ours, (theirs, SCORES[:, :columns], (X, Y, *NEGATIVES)))


@pytest.mark.parametrize(("kind", "function"), [("cosine", pairwise_cos_sim), ("dot", pairwise_dot_score)])
def test_kl_distillation(kind, function):
    peer = losses.DistillKLDivLoss(Nothing(), function, student_temperature=0.5, teacher_temperature=2.0)
    ours = lambda told, x, *c: distill.kl(distill.scores(x, jax.numpy.stack(c, 1), kind), told, 0.5, 2.0)
    check(ours, (peer.compute_loss_from_embeddings, SCORES, (X, Y, *NEGATIVES)))


@pytest.mark.parametrize(
    ("loss", "peer"), [(config.MarginMse, losses.MarginMSELoss), (config.KlDistillation, losses.DistillKLDivLoss)]
)
def test_taught_scores_by_product_are_their_defaults(loss, peer):
    """On towers whose similarity is the cosine."""
    arch = config.Bert(vocab_size=8, width=D, depth=1, heads=1, mlp=4, positions=4)
    names = ("anchor", "positive", "negative", "negative_2", "negative_3", "score", "score_2", "score_3", "score_4")
    task = config.Set(columns={name: name for name in names}, loss=loss(similarity="dot"))
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    made = objective.make(task, config.Model({"text": config.Tower(arch=arch)}), {"text": Embedder(arch)}, mesh)

    def ours(told, x, *c):
        outputs, targets = {"anchor": x, "positive": jax.numpy.stack(c, 1)}, made.targets({}, {"scores": told})
        return made.loss({}, outputs, targets, None)[0]

    check(ours, (peer(Nothing()).compute_loss_from_embeddings, SCORES, (X, Y, *NEGATIVES)))


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize(("kind", "function"), [("cosine", cos_sim), ("dot", dot_score)])
def test_global_orthogonal(kind, function, aggregation):
    peer = losses.GlobalOrthogonalRegularizationLoss(Nothing(), function, 0.5, 2.0, aggregation)

    def ours(_, *vectors):
        mean, second = compose.global_orthogonal(jax.numpy.stack(vectors), kind)
        gather = jax.numpy.mean if aggregation == "mean" else jax.numpy.sum
        return 0.5 * gather(mean) + 2.0 * gather(second)

    theirs = lambda vectors, _: sum(peer.compute_loss_from_embeddings(vectors).values())
    check(ours, (theirs, None, (X, Y, NEGATIVES[0])))

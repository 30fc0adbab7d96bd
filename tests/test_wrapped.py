"""What wraps a loss: prefixes, drawn ones, layers and sums, against the sums written out; teachers; dot products; refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, sharding
from embedjax.config.errors import ConfigError
from embedjax.losses import classify, compose, contrastive, distill, pairwise, triplet
from embedjax.losses.contrastive import Pairs, Rule, normalize
from embedjax.models import classifier
from embedjax.models.embedder import Embedder
from embedjax.objective.encoding import LAYERS, PREFIXES, drawn
from embedjax.objective.wrapped import chosen_prefixes

B, D = 6, 16
KEY = jnp.uint32(5)
ARCH = config.Bert(vocab_size=32, width=D, depth=3, heads=2, mlp=32, positions=8, init_std=0.2)
EMBEDDER = Embedder(ARCH, layers="scan")
TOWER = config.Tower(arch=ARCH)
DOT = config.Tower(arch=ARCH, similarity="dot")
ONE = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
RNG = np.random.default_rng(0)
OUTPUTS = {"anchor": RNG.normal(size=(B, D)), "positive": RNG.normal(size=(B, 3, D))}
OUTPUTS |= {"layers": {"anchor": RNG.normal(size=(B, 2, D)), "positive": RNG.normal(size=(B, 3, 2, D))}}
OUTPUTS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), OUTPUTS)
LAST = {name: OUTPUTS[name] for name in ("anchor", "positive")}
DIMS, WEIGHTS = (4, 16, 9), (1.0, 0.5, 2.0)
COLUMNS = ("anchor", "positive", "negative", "negative_2")


def make(loss, *columns, tower=TOWER, embedder=EMBEDDER, **options):
    model = config.Model(
        {"text": tower, "wise": dataclasses.replace(tower, similarity="dot")}, {"anchor": "text", "positive": "text"}
    )
    task = config.Set(columns={name: name for name in columns or COLUMNS}, loss=loss, **options)
    return objective.make(task, model, dict.fromkeys(model.towers, embedder), ONE)


def same(loss, wanted, outputs=LAST, targets=None, columns=COLUMNS, keys=(KEY,), params=None, **options):
    """The loss is `wanted(outputs, key)`, both in one program."""
    made = make(loss, *columns, **options)
    both = jax.jit(lambda outputs, targets, key: (made.loss(params or {}, outputs, targets, key), wanted(outputs, key)))
    for key in keys:
        (found, metrics), known = both(outputs, targets, key)
        np.testing.assert_allclose(found, known, rtol=1e-5)
    return metrics


def triplets(outputs, margin=1.0):
    return triplet.triplet(outputs["anchor"], outputs["positive"][:, 0], outputs["positive"][:, 1:], "euclidean", margin)


@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_any_set_of_numbers_is_drawn_equally_often(wanted):
    keys = jnp.arange(600, dtype=jnp.uint32)
    found = np.asarray(jax.jit(jax.vmap(lambda key: drawn(key, PREFIXES, 5, wanted)))(keys))
    assert found.shape == (600, wanted) and (np.diff(found, axis=1) > 0).all()
    assert np.abs(np.bincount(found.ravel(), minlength=5) / 600 - wanted / 5).max() < 0.08
    np.testing.assert_array_equal(drawn(jnp.uint32(0), 1, 5, wanted), drawn(None, 1, 5, wanted))


def test_nothing_is_drawn_where_all_are_wanted():
    for wanted in (0, 5, 9):
        np.testing.assert_array_equal(drawn(KEY, 1, 5, wanted), np.arange(5))


@pytest.mark.parametrize(("tower", "kind"), [(TOWER, "cosine"), (DOT, "dot")], ids=["cosine", "dot"])
def test_prefixes_are_normalised_anew_but_not_where_products_are_compared(tower, kind):
    loss = config.Triplet(margin=1.0, matryoshka=DIMS, matryoshka_weights=WEIGHTS)
    cut = lambda outputs, d: {name: x[..., :d] if kind == "dot" else normalize(x[..., :d]) for name, x in outputs.items()}
    same(loss, lambda o, _: sum(w * triplets(cut(o, d)) for d, w in zip(DIMS, WEIGHTS, strict=True)), tower=tower)


KEYS = tuple(map(jnp.uint32, range(6)))


def test_drawn_prefixes_alone_count():
    loss = config.Triplet(margin=1.0, matryoshka=DIMS, matryoshka_weights=WEIGHTS, dims_per_step=2)
    part = lambda o, d: triplets({name: normalize(x[..., :d]) for name, x in o.items()})
    counted = lambda key: chosen_prefixes(loss, key) * jnp.asarray(WEIGHTS)
    same(loss, lambda o, key: counted(key) @ jnp.stack([part(o, d) for d in DIMS]), keys=KEYS)
    assert len({tuple(np.asarray(chosen_prefixes(loss, key))) for key in KEYS}) > 1


@pytest.mark.parametrize("form", ["dense", "tiled"])
def test_drawn_prefixes_of_an_in_batch_loss(form):
    options = {"matryoshka": DIMS, "matryoshka_weights": WEIGHTS, "dims_per_step": 1, "mask_duplicates": False}
    loss = config.MultipleNegatives(**options, form=form)
    part = lambda o, d: contrastive.loss(Pairs(o["anchor"][:, :d], o["positive"][..., :d]), Rule(), 20.0)[0]
    counted = lambda key: chosen_prefixes(loss, key) * jnp.asarray(WEIGHTS)
    metrics = same(loss, lambda o, key: counted(key) @ jnp.stack([part(o, d) for d in DIMS]), targets=(None, None), keys=KEYS)
    if form == "dense":  # metrics are those of the prefix that was drawn
        length = DIMS[np.flatnonzero(chosen_prefixes(loss, KEYS[-1]))[0]]
        x, y = (np.asarray(x)[..., :length] for x in (LAST["anchor"], LAST["positive"][:, 0]))
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(metrics["positive"], cosine.mean(), rtol=1e-4)


def test_layers():
    loss = config.Triplet(margin=1.0, layers=config.Layers(2, 1.5, 0.7, "linear", 0.4, 0.3))
    chosen = np.asarray(drawn(KEY, LAYERS, 3, 2))

    def wanted(outputs, key):
        last = {name: outputs[name] for name in LAST}
        each = [{name: x[..., i, :] for name, x in outputs["layers"].items()} for i in range(2)]
        prior = sum(0.7 / 2 / (1 + n) * triplets(one) for n, one in zip(chosen, each, strict=True))
        return 1.5 * triplets(last) + prior + 0.4 * compose.layer_divergence(outputs["layers"], last, 0.3)

    same(loss, wanted, OUTPUTS)


def test_the_layers_a_step_draws_are_encoded():
    embedder, layers = EMBEDDER, config.Layers(2)
    params = {"text": jax.jit(embedder.init)(jax.random.key(0))}
    ids = RNG.integers(1, 32, (B, 5)).astype(np.int32)
    columns = {
        "anchor": {"ids": ids, "mask": np.ones(ids.shape, bool)},
        "row": np.arange(B, dtype=np.int32),
        "labels": ids[:, 0],
    }
    encode = make(config.BatchHard(layers=layers), "anchor", "label").encode

    def both(params, columns):
        out = embedder.apply(params["text"], columns["anchor"], want=("layers",))
        each = [embedder.pool(params["text"], tokens, columns["anchor"]) for tokens in out.layers]
        return encode({"towers": params}, {}, columns, None), jnp.stack(each, 1)

    outputs, each = jax.jit(both)(params, columns)
    assert each.shape == (B, 4, D)
    np.testing.assert_allclose(outputs["anchor"], each[:, -1], atol=1e-6)
    np.testing.assert_allclose(outputs["layers"]["anchor"], each[:, np.asarray(drawn(None, 1, 3, 2))], atol=1e-6)


def test_a_sum_is_weighted():
    scores = jnp.asarray(RNG.uniform(size=B), jnp.float32)
    losses = (config.CoSent(scale=5.0), config.MegaBatchMargin(matryoshka=(8, 16)), config.CoSent())

    def wanted(outputs, key):
        x, y = outputs["anchor"], outputs["positive"][:, 0]
        parts = [pairwise.cosent(x, y, scores, scale, "cosine") for scale in (5.0, 20.0)]
        mega = sum(triplet.mega_batch_margin(x[:, :d], y[:, :d], 0.8, 0.3) for d in (8, 16))
        return 2 * parts[0] + 0.5 * mega + parts[1]

    loss, columns = config.Sum(losses=losses, weights=(2.0, 0.5, 1.0)), ("anchor", "positive", "score")
    metrics = same(loss, wanted, targets=(scores, None, scores), columns=columns)
    assert metrics.keys() == {"CoSent_1", "MegaBatchMargin", "CoSent_3"}


def test_a_teacher_of_its_own_similarity_teaches_scores():
    embedder = dataclasses.replace(EMBEDDER, normalize=False)
    params = {name: jax.jit(embedder.init)(jax.random.key(i)) for i, name in enumerate(("text", "wise"))}
    text = lambda *shape: {"ids": RNG.integers(1, 32, (*shape, 5)).astype(np.int32), "mask": np.ones((*shape, 5), bool)}
    columns = {"anchor": text(B), "positive": text(B), "negative": text(B, 1), "row": np.arange(B, dtype=np.int32)}
    model = config.Model({"text": TOWER, "wise": DOT}, {"anchor": "text", "positive": "text"})
    task = config.Set(columns={n: n for n in COLUMNS[:3]}, loss=config.MarginMse(teacher="wise"))
    made = objective.make(task, model, {"text": embedder, "wise": embedder}, ONE)

    def both(params, columns):
        vectors = lambda column: embedder.apply(params["wise"], column, row=columns["row"]).pooled
        anchor, positive, negative = (vectors(columns[name]) for name in COLUMNS[:3])
        products = jnp.stack([(anchor * positive).sum(-1), (anchor * negative[:, 0]).sum(-1)], 1)
        return made.targets({"towers": params}, columns), products

    found, wanted = jax.jit(both)(params, columns)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    with pytest.raises(ConfigError, match="teacher 'wise' is trained"):
        made.targets({}, columns)


AS_IT_IS = dataclasses.replace(EMBEDDER, normalize=False)
TAUGHT = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)
STORED = {"anchor": TAUGHT, "positive": TAUGHT[:, None]}


@pytest.mark.parametrize("embedder", [EMBEDDER, AS_IT_IS], ids=["unit", "as it is"])
def test_a_stored_vector_is_cut_as_the_student_is(embedder):
    """Normalised where the tower normalises, as evaluation does; and it is the anchor's and the positive's, no negative's."""
    cut = lambda x, d: normalize(x[..., :d]) if embedder.normalize else x[..., :d]

    def wanted(outputs, key):
        each = jnp.stack([outputs["anchor"], outputs["positive"][:, 0]], 1)
        part = lambda d: ((cut(each, d) - (cut(TAUGHT, d) if d < D else TAUGHT)[:, None]) ** 2).mean()
        return part(16) + 2 * part(4)

    options = {"matryoshka": (16, 4), "matryoshka_weights": (1.0, 2.0)}
    pairs = {**LAST, "positive": LAST["positive"][:, :1]}
    columns = ("anchor", "positive", "vector")
    same(config.VectorDistillation(**options), wanted, pairs, STORED, columns, embedder=embedder)
    loss = config.Sum(losses=(config.VectorDistillation(), config.Triplet()), weights=(1.0, 0.0), **options)
    same(loss, wanted, LAST, (STORED, None), (*COLUMNS, "vector"), embedder=embedder)
    made = make(config.VectorDistillation(), *columns)
    stored = made.targets({}, {"vectors": TAUGHT})
    jax.tree.map(np.testing.assert_array_equal, stored, STORED)
    with pytest.raises(ConfigError, match="have 8 numbers, the student's 16.*Dense"):
        made.loss({}, pairs, made.targets({}, {"vectors": TAUGHT[:, :8]}), None)


@pytest.mark.parametrize("embedder", [EMBEDDER, AS_IT_IS], ids=["unit", "as it is"])
@pytest.mark.parametrize("summed", [False, True])
def test_a_class_head_reads_prefixes_as_they_are_evaluated(embedder, summed):
    """Normalised where the tower normalises; in a sum beside a loss whose prefixes always are."""
    labels, options = jnp.arange(B) % 3, {"matryoshka": DIMS, "matryoshka_weights": WEIGHTS}
    head = {"kernel": jnp.asarray(RNG.normal(size=(D, 3)), jnp.float32), "bias": jnp.zeros(3)}
    cut = lambda x, d: normalize(x[..., :d]) if embedder.normalize else x[..., :d]

    def wanted(outputs, key):
        total = 0.0
        for d, w in zip(DIMS, WEIGHTS, strict=True):
            scores = classifier.scores(head["kernel"], head["bias"], cut(outputs["anchor"], d))
            total += w * classify.cross_entropy(scores, labels)[0]
            if summed:
                total += w * triplets({name: normalize(x[..., :d]) for name, x in outputs.items()})
        return total

    loss, columns, targets = config.Classify(classes=3, **options), ("anchor", "label"), labels
    if summed:
        loss = config.Sum(losses=(config.Classify(classes=3), config.Triplet(margin=1.0)), **options)
        columns, targets = (*COLUMNS, "label"), (labels, None)
    same(loss, wanted, LAST, targets, columns, params={"loss": {"train": head}}, embedder=embedder)


@pytest.mark.parametrize("loss", [config.MarginMse, config.KlDistillation])
def test_scores_that_are_taught_have_a_similarity_of_their_own(loss):
    stored = jnp.asarray(RNG.uniform(size=(B, 3)), jnp.float32)
    columns = (*COLUMNS, "score", "score_2", "score_3")
    compare = distill.margin_mse if loss is config.MarginMse else lambda s, t: distill.kl(s, t, 1.0, 1.0)
    for chosen, tower, kind in (("dot", TOWER, "dot"), ("cosine", DOT, "cosine"), (None, TOWER, "cosine"), (None, DOT, "dot")):
        wanted = lambda o, _, kind=kind: compare(distill.scores(o["anchor"], o["positive"], kind), stored)
        same(loss(similarity=chosen), wanted, targets=stored, columns=columns, tower=tower)


def test_dot_products_are_compared_as_they_are():
    loss = config.MultipleNegatives(mask_duplicates=False)
    logits = lambda o: o["anchor"] @ o["positive"].reshape(-1, D).T
    wanted = lambda o, key: -jnp.diagonal(jax.nn.log_softmax(logits(o))[:, ::3]).mean()
    metrics = same(loss, wanted, targets=(None, None), tower=DOT)
    x, y = np.asarray(LAST["anchor"]), np.asarray(LAST["positive"][:, 0])
    np.testing.assert_allclose(metrics["positive"], (x * y).sum(1).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "columns", "word"),
    [
        (config.CoSent(), ("anchor", "positive"), "needs column 'score'"),
        (config.CoSent(), ("anchor", "positive", "score", "score_2"), "score_2"),
        (config.BatchHard(), ("anchor", "positive", "label"), "knows no column 'positive'"),
        (config.MarginMse(), (*COLUMNS, "score"), "2 or 3|3 or 2"),
        (config.KlDistillation(), (*COLUMNS, "score", "score_2"), "needs 3 score columns"),
        (config.MarginMse(), ("anchor", "positive", "score"), "not of the negatives that are mined"),
        (config.VectorDistillation(), (*COLUMNS, "vector"), "knows no column 'negative'"),
        (config.MarginMse(teacher="nobody"), COLUMNS, "nobody"),
        (config.ContrastiveDistillation(), COLUMNS, "needs a `teacher`"),
        (config.Triplet(matryoshka=(32,)), COLUMNS, "prefix 32.*16"),
        (config.Sum(losses=(config.CoSent(), config.Triplet())), COLUMNS, "needs column 'score'"),
    ],
)
def test_sets_that_a_loss_cannot_use_are_refused(loss, columns, word):
    mine = {"mine": config.Mine()} if "are mined" in word else {}
    with pytest.raises(ConfigError, match=word):
        make(loss, *columns, **mine)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: config.Triplet(matryoshka=(4, 8), dims_per_step=3), "dims_per_step"),
        (lambda: config.Layers(per_step=-1), "per_step"),
        (lambda: config.Sum(), "empty"),
        (lambda: config.Sum(losses=(config.Triplet(),), weights=(1.0, 2.0)), "2 numbers for 1"),
        (lambda: config.Sum(losses=(config.Triplet(layers=config.Layers()),)), "set them on the Sum"),
        (lambda: config.Sum(losses=(config.Triplet(matryoshka=(4,)),), matryoshka=(8,)), "set one of them"),
        (lambda: config.GlobalOrthogonal(mean_weight=0.0, second_moment_weight=0.0), "not both be 0"),
        (lambda: config.CoSent(scale=0.0), "scale"),
        (lambda: config.KlDistillation(temperature=0.0), "temperature"),
        (lambda: config.KlDistillation(teacher_temperature=math.inf), "teacher_temperature"),
        (lambda: config.CoSent(scale=math.nan), "scale"),
        (lambda: config.ContrastiveDistillation(scale=101.0), "scale is 101"),
        (lambda: config.ContrastiveDistillation(teacher_scale=math.nan), "teacher_scale"),
        (lambda: config.ContrastiveDistillation(scale=0.5, learn_scale=True), "learned must be at least 1"),
        (lambda: config.VectorDistillation(document_teacher="wise"), "no teacher is named"),
        (lambda: config.Triplet(margin=-1.0), "margin"),
        (lambda: config.Triplet(margin=math.nan), "margin"),
        (lambda: config.Contrastive(margin=math.inf), "margin"),
        (lambda: config.OnlineContrastive(margin=-0.1), "OnlineContrastive.margin"),
        (lambda: config.BatchAll(margin=-0.1), "margin"),
        (lambda: config.BatchHard(margin=math.nan), "margin"),
        (lambda: config.BatchSemiHard(margin=-0.1), "margin"),
        (lambda: config.MegaBatchMargin(positive_margin=math.inf), "positive_margin"),
        (lambda: config.MegaBatchMargin(negative_margin=-0.1), "negative_margin"),
        (lambda: config.Triplet(matryoshka=(4, 8), matryoshka_weights=(1.0, -1.0)), "matryoshka_weights"),
        (lambda: config.Sum(losses=(config.Triplet(),), weights=(math.nan,)), "Sum.weights"),
        (lambda: config.Layers(kl_weight=math.nan), "kl_weight"),
        (lambda: config.GlobalOrthogonal(mean_weight=math.inf), "mean_weight"),
        (lambda: config.Sum(losses=(config.Classify(classes=2), config.Classify(classes=2))), "one loss with a class head"),
        (lambda: config.Sum(losses=(config.Classify(classes=3), config.Contrastive())), "different numbers of classes"),
    ],
)
def test_values_that_make_no_sense_are_refused(build, word):
    with pytest.raises(ConfigError, match=word):
        build()


def test_a_sum_has_the_head_of_its_loss_and_static_towers_no_layers():
    loss = config.Sum(losses=(config.Classify(classes=2), config.SupCon()))
    task = config.Set(columns={"anchor": "a", "label": "b"}, loss=loss)
    found = objective.loss_params(task, config.Model({"text": TOWER}), {"text": Embedder(ARCH)}, jax.random.key(0))
    assert found["train"]["kernel"].shape == (D, 2)
    table = config.Static(vocab_size=32, width=D)
    static = config.Model({"text": config.Tower(arch=table)})
    with pytest.raises(ConfigError, match="static"):
        objective.make(
            dataclasses.replace(task, loss=config.BatchHard(layers=config.Layers())), static, {"text": Embedder(table)}, ONE
        )


def test_losses_are_stored_and_read_back():
    from embedjax.config.serialize import from_json, to_json

    inner = (config.MultipleNegatives(matryoshka=(4, 2)), config.GlobalOrthogonal(), config.MarginMse(teacher="wise"))
    loss = config.Sum(losses=inner, weights=(1.0, 0.5, 2.0), layers=config.Layers(weighting="log"))
    assert from_json(to_json(loss), config.Loss) == loss

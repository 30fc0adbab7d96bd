"""Negatives that a run mines for itself at some steps, with the model it has become."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float, Int32

from embedjax import distributed
from embedjax.data.corpus import Corpus
from embedjax.data.mined import Mined
from embedjax.load import Model, adapted
from embedjax.mine.choose import filled, mixed
from embedjax.mine.nearest import negatives, stream


def mining_due(sets: Mapping[str, Mined], step: int) -> bool:
    """Whether a set is mined anew after this step."""
    return any(step % mined.every == 0 for mined in sets.values())


def renew(
    sets: Mapping[str, Mined], model: Callable[[], Model], step: int, *, seed: int, mesh: DeviceMesh, patience: float
) -> Iterator[str]:
    """Mines what is due after a step and keeps it in the run folder, unless it is there: a run that was killed later and goes
    on before it meets the same. Lines tell what was done. Of several processes all have to call it."""
    for name, mined in sets.items():
        if step % mined.every:
            continue
        if distributed.gather("looking for mined negatives", int(mined.there(step)), limit=patience)[0]:
            continue
        numbers, lacking = mine(mined, adapted(model(), mined.adapter), step, seed=seed, mesh=mesh)
        with distributed.together("keeping mined negatives", patience):
            if distributed.first():
                mined.keep(step, numbers)
        filled_up = f"; {lacking} are random, for want of documents that fit" if lacking else ""
        yield (
            f"step {step}: mined negatives of {len(mined.pairs.rows)} pairs of set {name!r} from {len(mined.corpus)} documents"
            f"{filled_up}"
        )


def mine(
    mined: Mined, model: Model, step: int, *, seed: int, mesh: DeviceMesh | None = None
) -> tuple[Int32[np.ndarray, "N K"], int]:
    """The negatives of each row of a set, and how many are random: a pair with too few documents that fit is filled up with
    those that are not known to be its positives."""
    mined.how.check(model.config.similarity)
    sides = {"query": mined.pairs.anchors, "document": mined.corpus}
    vectors = {column: _vectors(model, texts, column, mined.prompt or None, mesh) for column, texts in sides.items()}
    known, total = mined.pairs.known(mined.corpus), len(mined.corpus)
    chance = int(mixed(seed, np.array([step]), np.zeros(1, int))[0])  # each mining chooses anew
    numbers, lacking = np.empty((len(mined.pairs.anchors), mined.how.num_negatives), np.int32), 0
    for block, found in negatives(mined.how, mined.pairs, known, vectors["query"], vectors["document"], mesh=mesh, seed=chance):
        lacking += int((found.numbers < 0).sum())
        own, anchors = known.padded(block), np.array(block)
        numbers[block.start : block.stop] = filled(found.numbers, own, anchors, total=total, seed=chance)
    return numbers[np.maximum(mined.pairs.anchor, 0)], lacking  # a row that cannot be used takes any: it is never read


def _vectors(model: Model, texts: Corpus, column: str, task: str | None, mesh: DeviceMesh | None) -> Float[np.ndarray, "N E"]:
    """The vectors of all texts, in memory once."""
    result = np.empty((len(texts), model.embedders[model.config.tower_of(column)].width), np.float32)
    at = 0
    for block in stream(model, texts, column, task=task, mesh=mesh):
        result[at : at + len(block)] = block
        at += len(block)
    return result

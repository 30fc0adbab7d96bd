"""Losses that tell tokens: masked language modelling, and the denoising auto-encoder.

All of it works row by row, so it happens in `encode`, where batches come in chunks: what the loss sees of a row is three
numbers. A set's head is under its name in `params["loss"]`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from embedjax.config import Bert, DenoisingAutoEncoder, MaskedLanguage, Model, Roberta, Set, Transformer
from embedjax.config.errors import ConfigError
from embedjax.data.tokenizer import BERT_SPECIALS, ROLES, load_tokenizer
from embedjax.losses import tokens
from embedjax.models import folders
from embedjax.models.decoder import Decoder, WordHead, init_decoder, tied
from embedjax.models.embedder import Embedder
from embedjax.models.noise import delete_words, hide
from embedjax.models.ops import mix
from embedjax.objective.encoding import require
from embedjax.objective.kinds import Objective, combine

DECODING = 0x64656364  # the decoder drops apart from the encoder


def resolve(task: Set, model: Model, known: Set | None = None) -> Set:
    """The set with the id of the mask token, if its loss needs one and leaves it open; `known` is the same set as a run stored
    it. Raises ConfigError for a tokenizer without."""
    loss = task.loss
    if not isinstance(loss, MaskedLanguage) or loss.mask_id is not None:
        return task
    tower = model.texts.get(model.tower_of("anchor"))
    if tower is None:
        raise ConfigError(f"set {task.name!r}: MaskedLanguage hides words; the tower of its anchors is one of pictures")
    if known is not None and isinstance(known.loss, MaskedLanguage):
        found = known.loss.mask_id
    elif tower.tokenizer == "wordpiece":
        found = BERT_SPECIALS.index("[MASK]")
    else:
        tokenizer = load_tokenizer(folders.resolve(tower.tokenizer or tower.init))
        found = next((i for name in ROLES["mask_token"] if (i := tokenizer.token_to_id(name)) is not None), None)
    if found is None:
        known_as = " or ".join(ROLES["mask_token"])
        raise ConfigError(f"set {task.name!r}: the tokenizer has no mask token ({known_as}); name the loss's mask_id")
    return dataclasses.replace(task, loss=dataclasses.replace(loss, mask_id=found))


def masked_language(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError for a tower without token vectors, and for a mask token that is no row of its table."""
    loss, (name, embedder, arch) = task.loss, _tower(task, model, embedders)
    assert isinstance(loss, MaskedLanguage)
    if loss.mask_id is None or loss.mask_id >= arch.vocab_size:
        raise ConfigError(f"set {task.name!r}: mask_id is {loss.mask_id}; it must be below the {arch.vocab_size} tokens")
    mask_id, head = loss.mask_id, WordHead(arch, embedder.compute)

    def encode(params, constants, columns, key):
        tower, own = _parameters(params, constants, name, task)
        column, row = columns["anchor"], columns["row"]
        hidden = hide(
            column["ids"], column["word"], row, jnp.uint32(0) if key is None else key,
            share=loss.share, whole_words=loss.whole_words, mask_id=mask_id, vocab_size=arch.vocab_size,
        )  # fmt: skip
        seen = embedder.apply(tower, {**column, "ids": hidden.ids}, row=row, key=key, want=("tokens",)).tokens
        assert seen is not None
        at_BPD = jnp.take_along_axis(seen, hidden.places[..., None], axis=1)
        logits: Any = head.apply({"params": own}, at_BPD, tower["encoder"]["tokens"]["embedding"])
        labels_BP = jnp.take_along_axis(column["ids"], hidden.places, axis=1)
        return tokens.cross_entropy(logits, labels_BP, hidden.counts)._asdict()

    return Objective(encode, lambda constants, columns: {}, _mean)


def denoising(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Raises ConfigError for a tower whose layers cannot be a decoder's, or whose embedding has another width than they."""
    loss, (name, embedder, arch) = task.loss, _tower(task, model, embedders)
    assert isinstance(loss, DenoisingAutoEncoder)
    if not isinstance(arch, Bert | Roberta):
        raise ConfigError(f"set {task.name!r}: DenoisingAutoEncoder trains BERT and RoBERTa towers, not {type(arch).__name__}")
    if embedder.width != arch.width:
        raise ConfigError(
            f"set {task.name!r}: the decoder reads vectors of {arch.width} numbers, the tower's have {embedder.width}"
        )
    decoder = Decoder(arch, embedder.compute, embedder.remat, embedder.layers)
    head = WordHead(arch, embedder.compute)

    def encode(params, constants, columns, key):
        tower, own = _parameters(params, constants, name, task)
        column, row = columns["anchor"], columns["row"]
        noise = jnp.uint32(0) if key is None else key
        noisy = delete_words(column, row, noise, share=loss.deleted, pad_id=arch.pad_id)
        vector = embedder.apply(tower, noisy, row=row, key=key).pooled
        ids, mask = column["ids"], column["mask"]
        whole = {"params": tied(tower["encoder"], own["decoder"], model.towers[name].freeze_layers)}
        salted = None if key is None else mix(key ^ jnp.uint32(DECODING))
        states: Any = decoder.apply(whole, ids[:, :-1], mask[:, :-1], vector, row_B=row, key=salted)
        logits: Any = head.apply({"params": own}, states, tower["encoder"]["tokens"]["embedding"])
        return tokens.cross_entropy(logits, ids[:, 1:], mask[:, 1:])._asdict()

    return Objective(encode, lambda constants, columns: {}, _mean)


def masked_language_head(task: Set, model: Model, embedders: Mapping[str, Embedder], key: jax.Array) -> dict[str, Any]:
    """Random values of the head."""
    _, _, arch = _tower(task, model, embedders)
    made: Any = WordHead(arch).init(key, jnp.zeros((1, 1, arch.width)), jnp.zeros((arch.vocab_size, arch.width)))
    return made["params"]


def denoising_head(task: Set, model: Model, embedders: Mapping[str, Embedder], key: jax.Array) -> dict[str, Any]:
    """Random values of the head and of the decoder's own part."""
    _, _, arch = _tower(task, model, embedders)
    assert isinstance(arch, Bert | Roberta)
    of_decoder, of_head = jax.random.split(key)
    return masked_language_head(task, model, embedders, of_head) | {"decoder": init_decoder(of_decoder, arch)}


def _mean(params, outputs, targets, key):
    return tokens.mean(tokens.Told(**outputs))


def _tower(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> tuple[str, Embedder, Transformer]:
    require(task, {"anchor"}, set())
    name = model.tower_of("anchor")
    arch = embedders[name].arch
    if not isinstance(arch, Transformer):
        raise ConfigError(f"set {task.name!r}: {type(task.loss).__name__} needs the token vectors of a transformer tower")
    return name, embedders[name], arch


def _parameters(params: Mapping, constants: Mapping, name: str, task: Set) -> tuple[dict, dict]:
    """The tower's and the head's."""
    towers = combine(params.get("towers", {}), constants.get("towers", {}))
    return towers[name], params["loss"][task.name]

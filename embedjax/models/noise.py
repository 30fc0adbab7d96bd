"""Tokens hidden and words left out, inside the jitted step: pure functions of (key, global row, place in the text), as dropout
is, so that neither chunks nor devices change them."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from embedjax.models.ops import GOLDEN, mix

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (Devlin et al. 2018, section 3.1)

PIECES = 4  # of a long word: most have one or two

NOISE = np.uint32(0x6E6F6973)  # noise and dropout of one key draw apart


class Hidden(NamedTuple):
    """A batch with tokens hidden, and where: `places` [B P] of which `counts` says which are meant."""

    ids: Int[Array, "B L"]
    places: Int[Array, "B P"]
    counts: Bool[Array, "B P"]


def draws(key: UInt32[Array, ""], row_B: Int[Array, "B"], place_BL: Int[Array, "B L"], purpose: int) -> Float[Array, "B L"]:
    """A number in [0, 1) for every place: a token's position, or the number of its word. `purpose` tells uses apart."""
    seed_B = mix(row_B.astype(jnp.uint32) ^ mix((key ^ NOISE) + GOLDEN * jnp.uint32(purpose)))
    bits_BL = mix(seed_B[:, None] + GOLDEN * (place_BL + 1).astype(jnp.uint32))
    return (bits_BL >> 8).astype(jnp.float32) * 2.0**-24


def most_hidden(length: int, share: float, whole_words: bool) -> int:
    """Room for the chosen tokens of a text: four standard deviations above their mean number. Whole words spread that number
    wider: there it is room for words of `PIECES`."""
    spread = (PIECES if whole_words else 1) * share * (1 - share) * length
    return min(length, math.ceil(share * length + 4 * math.sqrt(spread)))


def hide(
    ids: Int[Array, "B L"],
    word: Int[Array, "B L"],
    row: Int[Array, "B"],
    key: UInt32[Array, ""],
    *,
    share: float,
    whole_words: bool,
    mask_id: int,
    vocab_size: int,
) -> Hidden:
    """Choose a `share` of the tokens or whole words for masked language modelling, as transformers' collator does.

    `word` is the number of each token's word, -1 for special tokens and padding, which are never chosen. Of a text no more than
    `most_hidden` are chosen, the first: the scores of the vocabulary are then computed for these alone, not for every token.
    """
    here_BL = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    chosen_BL = (draws(key, row, word if whole_words else here_BL, 1) < share) & (word >= 0)
    to_BPL = _gathered(chosen_BL, most_hidden(ids.shape[1], share, whole_words))
    chosen_BL = to_BPL.any(1)
    fate_BL, other_BL = draws(key, row, here_BL, 2), (draws(key, row, here_BL, 3) * vocab_size).astype(ids.dtype)
    shown_BL = jnp.where(fate_BL < MASKED, mask_id, jnp.where(fate_BL < MASKED + REPLACED, other_BL, ids))
    return Hidden(jnp.where(chosen_BL, shown_BL, ids), (to_BPL * here_BL[:, None]).sum(2), to_BPL.any(2))


def delete_words(
    column: Mapping[str, Array], row: Int[Array, "B"], key: UInt32[Array, ""], *, share: float, pad_id: int
) -> dict[str, Array]:
    """The column without a `share` of its words, the rest moved up; the word that draws highest always stays.

    Special tokens stay, and so do those of a prompt that is not pooled.
    """
    word_BL, mask_BL = column["word"], column["mask"]
    loose_BL = (word_BL >= 0) & column.get("pool", mask_BL)
    drawn_BL = jnp.where(loose_BL, draws(key, row, word_BL, 4), -1.0)
    stays_BL = (drawn_BL >= share) | (drawn_BL == drawn_BL.max(1, keepdims=True))
    keep_BL = mask_BL & (stays_BL | ~loose_BL)
    from_BLL = _gathered(keep_BL, word_BL.shape[1])
    filled_BL = from_BLL.any(2)
    found = {"ids": jnp.where(filled_BL, (from_BLL * column["ids"][:, None]).sum(2), pad_id), "mask": filled_BL}
    return found | ({"pool": (from_BLL & column["pool"][:, None]).any(2)} if "pool" in column else {})


def _gathered(wanted_BL: Bool[Array, "B L"], count: int) -> Bool[Array, "B P L"]:
    """Which place each of the first `count` wanted ones has: [b, p, l] says that l is the p-th. Cheaper than a sort."""
    rank_BL = jnp.where(wanted_BL, jnp.cumsum(wanted_BL, axis=1) - 1, -1)
    return rank_BL[:, None] == jnp.arange(count)[None, :, None]

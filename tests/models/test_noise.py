"""Hidden tokens and deleted words: shares, what is never touched, and independence from chunks and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax.models.noise import delete_words, draws, hide, most_hidden

B, L, V, MASK = 512, 32, 1000, 4
KEY = jnp.uint32(3)


def texts(rows=B, length=L):
    """Words of one to three pieces, ids above 4; row r is the same however many rows or places there are."""
    ids, word = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    mask = np.zeros((rows, length), bool)
    for r in range(rows):
        rng = np.random.default_rng(r)
        words = np.repeat(np.arange(20), rng.integers(1, 4, 20))[: rng.integers(6, L - 2)]
        n = len(words)
        ids[r, : n + 2] = [2, *rng.integers(5, V, n), 3]
        word[r, 1 : n + 1] = words
        mask[r, : n + 2] = True
    return {"ids": ids, "mask": mask, "word": word}


@functools.partial(jax.jit, static_argnames=("share", "whole_words"))
def jitted(ids, word, row, share, whole_words):
    return hide(ids, word, row, KEY, share=share, whole_words=whole_words, mask_id=MASK, vocab_size=V)


def hidden(column, row=None, share=0.15, whole_words=False):
    return jitted(column["ids"], column["word"], np.arange(B) if row is None else row, share, whole_words)


@functools.partial(jax.jit, static_argnames="share")
def deleted(column, share):
    return delete_words(column, jnp.arange(B), KEY, share=share, pad_id=0)


def scattered(found):
    """Where tokens were chosen [B L], from places and counts."""
    chosen = np.zeros(found.ids.shape, bool)
    for r, (places, counts) in enumerate(zip(found.places, found.counts, strict=True)):
        chosen[r, np.asarray(places)[np.asarray(counts)]] = True
    return chosen


@pytest.mark.parametrize("whole_words", [False, True])
def test_fifteen_in_a_hundred_are_chosen_and_eight_tenths_of_them_masked(whole_words):
    column = texts()
    found = hidden(column, whole_words=whole_words)
    chosen, inside = scattered(found), column["word"] >= 0
    assert not (chosen & ~inside).any()
    assert abs(chosen[inside].mean() - 0.15) < 0.012
    shown = np.asarray(found.ids)
    assert (shown == column["ids"])[~chosen].all()
    masked, same = (shown == MASK)[chosen].mean(), (shown == column["ids"])[chosen].mean()
    assert abs(masked - 0.8) < 0.035
    assert abs(same - 0.1) < 0.03
    np.testing.assert_array_equal(np.asarray(found.counts).sum(1), chosen.sum(1))


def test_whole_words_are_chosen_whole():
    column = texts()
    chosen = scattered(hidden(column, whole_words=True))
    room = most_hidden(L, 0.15, True)
    for r in np.flatnonzero(chosen.sum(1) < room):  # a text that is full may end within a word
        for w in range(column["word"][r].max() + 1):
            assert len(set(chosen[r, column["word"][r] == w])) == 1


@pytest.mark.parametrize("pieces", [1, 4])
def test_there_is_room_for_words_of_four_pieces(pieces):
    """Nearly every text has all its chosen words hidden, to the last piece."""
    length, rows = 128, np.arange(2048)
    word = np.broadcast_to(np.arange(length) // pieces, (len(rows), length)).astype(np.int32)
    found = hide(
        jnp.full(word.shape, 5),
        jnp.asarray(word),
        jnp.asarray(rows),
        KEY,
        share=0.15,
        whole_words=pieces > 1,
        mask_id=MASK,
        vocab_size=V,
    )
    chosen = np.asarray(draws(KEY, jnp.asarray(rows), jnp.asarray(word), 1) < 0.15).sum(1)
    full = np.asarray(found.counts).sum(1)
    assert (chosen > full).mean() < 0.001
    assert chosen.max() > (40 if pieces > 1 else 30)


def test_no_more_are_chosen_than_there_is_room_for():
    found = hidden(texts(), share=0.5)
    room = most_hidden(L, 0.5, False)
    assert found.places.shape[1] == room < L
    assert scattered(found).sum(1).max() <= room
    assert most_hidden(4, 0.15, False) == 4


def test_noise_goes_by_row_and_place_alone():
    whole, part = hidden(texts()), {k: x[64:96] for k, x in texts().items()}
    np.testing.assert_array_equal(hidden(part, np.arange(64, 96)).ids, whole.ids[64:96])
    wide = {k: np.pad(x, ((0, 0), (0, 8)), constant_values=-1 if k == "word" else 0) for k, x in texts().items()}
    np.testing.assert_array_equal(hidden(wide).ids[:, :L], whole.ids)
    assert (hidden(part, np.arange(32)).ids != whole.ids[64:96]).any()


def test_six_words_in_ten_are_deleted_and_the_rest_moves_up():
    column = texts() | {"pool": texts()["mask"].copy()}
    found = {k: np.asarray(x) for k, x in deleted(column, 0.6).items()}
    kept = total = 0
    for r in range(B):
        mask = column["mask"][r]
        left = found["ids"][r][found["mask"][r]]
        words = {w: tuple(column["ids"][r][column["word"][r] == w]) for w in range(column["word"][r].max() + 1)}
        assert left[0] == 2 and left[-1] == 3 and len(left) > 2
        place = 1
        for pieces in words.values():  # what is left is a subsequence of whole words
            if tuple(left[place : place + len(pieces)]) == pieces:
                place, kept = place + len(pieces), kept + 1
        assert place == len(left) - 1
        total += len(words)
        assert found["mask"][r].sum() == len(left) <= mask.sum()
        assert (found["ids"][r][len(left) :] == 0).all()
    assert abs(kept / total - 0.4) < 0.03
    np.testing.assert_array_equal(found["pool"], found["mask"])


def test_one_word_stays_and_a_prompt_that_is_not_pooled_too():
    column = texts()
    found = deleted(column, 0.999999)
    assert (np.asarray(found["mask"]).sum(1) >= 3).all()
    pool = column["mask"] & (np.arange(L) > 3)[None]
    found = deleted(column | {"pool": pool}, 0.6)
    np.testing.assert_array_equal(np.asarray(found["ids"])[:, :4], column["ids"][:, :4])
    assert not np.asarray(found["pool"])[:, :4].any()

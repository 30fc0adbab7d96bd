"""Strings -> token ids and masks for one tower: prompts, truncation, padding, and what late interaction adds.

Does not choose lengths or order; batches.py and the encoder do. The tokenizer comes from `tokenizer.py`.
"""

import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer

from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.config.late import Late, Side
from embedjax.config.model import side_of
from embedjax.data.tokenizer import ROLES

# Pre-tokenizers after which no token spans a space, so the tokens before a space do not depend on what follows it.
SPACE_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
CHARS_PER_TOKEN = 6  # characters tried first for each token wanted; English has 4 to 5, code 4


class Piece(NamedTuple):
    """A token of a text of late interaction: the characters it stands for, or what it is called if it stands for none."""

    name: str
    """The token itself, such as "##ing", "[MASK]" or a marker."""
    start: int
    end: int
    """Its characters in the text; none (0, 0) for special tokens, markers, [MASK] and those of the prompt."""
    compared: bool
    """Whether its vector is compared, or it is skipped."""

    @property
    def placed(self) -> bool:
        """Whether it stands for characters of the text."""
        return self.end > self.start


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """What turns strings into the inputs of one tower. Several threads may use one.

    `prompts` are texts by name, put before every string; with `include_prompt` false their tokens are not pooled.
    `pad_id` None takes the tokenizer's own. With `fills` every text has `max_length` tokens: padding counts as they do.
    `late` makes them texts of late interaction, of one `side` of it, which `of` changes: `max_length` is that side's.
    The tokenizer itself is not changed.
    Raises ConfigError for a length without room for a token, an unknown prompt, or a tokenizer without padding token.
    """

    tokenizer: Tokenizer = dataclasses.field(repr=False)
    max_length: int
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    pad_id: int | None = None
    pad_side: Literal["right", "left"] = "right"
    fills: bool = False
    late: Late | None = None
    side: Side = "document"
    _truncating: dict[int, Tokenizer] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False)
    _cuts: bool = dataclasses.field(init=False, repr=False)
    _marker: int | None = dataclasses.field(default=None, init=False, repr=False)
    _skip: tuple[int, ...] = dataclasses.field(default=(), init=False, repr=False)
    _mask_id: int = dataclasses.field(default=0, init=False, repr=False)

    def __post_init__(self):
        if self.late is not None:
            self._set_late(self.late)
        if self.pad_id is None:
            pad = next((token for token in ROLES["pad_token"] if self.tokenizer.token_to_id(token) is not None), None)
            if pad is None:
                raise ConfigError("the tokenizer has no padding token ([PAD] or <pad>); name its pad_id")
            object.__setattr__(self, "pad_id", self.tokenizer.token_to_id(pad))
        object.__setattr__(self, "_cuts", _splits_at_spaces(json.loads(self.tokenizer.to_str())["pre_tokenizer"]))
        self._at(self.max_length)
        self._prefix(None)

    def _set_late(self, late: Late) -> None:
        known, marker = self.tokenizer.token_to_id, late.marker(self.side)
        if marker and known(marker) is None:
            raise ConfigError(f"the tokenizer has no token {marker!r}, the marker of a {self.side}")
        mask_id = next((known(token) for token in ROLES["mask_token"] if known(token) is not None), None)
        if late.expand and mask_id is None:
            raise ConfigError("the tokenizer has no [MASK] token to fill queries with; set Late.expand to False")
        found = [known(token) for token in late.skip]
        for name, value in {
            "max_length": late.length(self.side),
            "_marker": known(marker) if marker else None,
            "_mask_id": mask_id or 0,
            "_skip": tuple(k for k in found if k is not None),
        }.items():
            object.__setattr__(self, name, value)

    def of(self, column: str) -> "Texts":
        """These texts as those of a column: for late interaction queries or documents, else simply these."""
        if self.late is None or side_of(column) == self.side:
            return self
        return dataclasses.replace(self, side=side_of(column))

    @property
    def filled(self) -> bool:
        """Whether every text has `max_length` tokens: those of a tower that fills, queries of late interaction."""
        return self.fills or self._expands

    @property
    def _expands(self) -> bool:
        return self.late is not None and self.late.expand and self.side == "query"

    def encode(
        self, texts: Sequence[str], *, length: int | None = None, prompt: str | None = None, words: bool = False
    ) -> dict[str, np.ndarray]:
        """{"ids": int32 [N L], "mask": bool [N L]}; "pool": bool [N L] when a prompt is used that is not pooled; with `words`
        "word": int32 [N L], the number of the word a token is a piece of, -1 for special tokens and padding; for late
        interaction "score": bool [N L], the tokens that are compared.

        L is `length`, or that of the longest text; never more than `max_length` of it are tokens. `prompt` is a name in
        `prompts`; None takes the default prompt. Raises DataError for what is not a string of valid Unicode, ConfigError for
        a length below one that texts are to fill.
        """
        if self.filled:
            length = self.max_length if length is None else length
            if length < self.max_length:
                raise ConfigError(
                    f"texts of {length} tokens are asked for, but the tower's fill its max_length of {self.max_length}: set "
                    f"{'Late.query_length' if self._expands else 'max_length'}, and leave data.buckets empty"
                )
        prefix = self._prefix(prompt)
        encodings = self._tokenize([prefix + text for text in texts] if prefix else texts, length, words)
        rows = [encoding.ids for encoding in encodings]
        if self._marker is not None:
            rows = [[*ids[:1], self._marker, *ids[1:]] for ids in rows]
        sizes = np.fromiter(map(len, rows), np.int32, len(rows))
        width = sizes.max(initial=0) if length is None else length
        places = np.arange(width)[None]
        within = lambda n: places < n[:, None] if self.pad_side == "right" else places >= width - n[:, None]
        mask = within(sizes)
        ids = np.full(mask.shape, self.pad_id, np.int32)
        ids[mask] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, sizes.sum())
        columns = {"ids": ids, "mask": mask}
        if words:
            columns["word"] = np.full(mask.shape, -1, np.int32)
            columns["word"][mask] = [-1 if k is None else k for encoding in encodings for k in encoding.word_ids]
            special = [k for k, token in self.tokenizer.get_added_tokens_decoder().items() if token.special]
            columns["word"][np.isin(ids, special)] = -1  # those written in the text have a word
        if self.late is not None:
            columns |= self._compared(self.late, ids, mask, within(np.full_like(sizes, self.max_length)))
            return columns
        if self.fills:
            columns["mask"] = mask = within(np.full_like(sizes, self.max_length))
        if prefix and not self.include_prompt:
            columns["pool"] = mask & (np.cumsum(mask, axis=1) > self._prompt_tokens(prefix))
        return columns

    def _compared(self, late: Late, ids: np.ndarray, mask: np.ndarray, filled: np.ndarray) -> dict[str, np.ndarray]:
        """What late interaction changes: tokens that fill a query are compared, though the others may not see them."""
        if not self._expands:
            skipped = np.isin(ids, self._skip) if self.side == "document" else np.zeros_like(mask)
            return {"score": mask & ~skipped}
        ids = np.where(filled & ~mask, self._mask_id, ids).astype(np.int32)
        return {"ids": ids, "mask": filled if late.attend else mask, "score": filled}

    def pieces(self, text: str, *, prompt: str | None = None) -> list[Piece]:
        """The tokens of a text, as `encode` has them after truncation: for a person to see what is compared. Raises what it
        raises; texts of late interaction alone."""
        assert self.late is not None
        columns, before = self.encode([text], prompt=prompt), len(prefix := self._prefix(prompt))
        (encoding,) = self._tokenize([prefix + text], None, words=True)  # which knows where a token stands
        spans = list(encoding.offsets)
        if self._marker is not None:
            spans.insert(1, (0, 0))
        spans += [(0, 0)] * (columns["ids"].shape[1] - len(spans))
        found = []
        for token, compared, (start, end) in zip(columns["ids"][0].tolist(), columns["score"][0].tolist(), spans, strict=True):
            start, end = max(start - before, 0), max(end - before, 0)
            name = self.tokenizer.id_to_token(token) or str(token)
            found.append(Piece(name, *((start, end) if end > start else (0, 0)), compared))
        return found

    def lengths(self, texts: Sequence[str], prompt: str | None = None) -> Int32[np.ndarray, " N"]:
        """Number of tokens of each text after truncation to `max_length`, prompt and special tokens included."""
        if self.filled:
            return np.full(len(texts), self.max_length, np.int32)
        prefix = self._prefix(prompt)
        encodings = self._tokenize([prefix + text for text in texts] if prefix else texts, None)
        marker = int(self._marker is not None)
        return np.fromiter((len(encoding) + marker for encoding in encodings), np.int32, len(encodings))

    def _prefix(self, prompt: str | None) -> str:
        name = self.default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name not in self.prompts:
            raise ConfigError(f"there is no prompt {name!r}; {nearest(name, self.prompts)}")
        return self.prompts[name]

    def _prompt_tokens(self, prefix: str) -> int:
        """Tokens of the prompt alone, special ones before it included, one after it not: as sentence-transformers counts."""
        ids = self._tokenize([prefix], None)[0].ids
        last = self.tokenizer.get_added_tokens_decoder().get(ids[-1]) if ids else None
        return len(ids) - (last is not None and last.special)

    def _at(self, length: int | None) -> Tokenizer:
        """A copy of the tokenizer that truncates to `length`, a marker's place left: changing one copy's truncation would race
        between threads."""
        length = (self.max_length if length is None else min(length, self.max_length)) - (self._marker is not None)
        with self._lock:
            if length not in self._truncating:
                special = self.tokenizer.num_special_tokens_to_add(False)
                if length <= special:
                    raise ConfigError(f"a length of {length} tokens has no room beside {special} special tokens")
                copy = Tokenizer.from_str(self.tokenizer.to_str())
                copy.no_padding()
                copy.enable_truncation(length)
                self._truncating[length] = copy
            return self._truncating[length]

    def _tokenize(self, texts: Sequence[str], length: int | None, words: bool = False) -> list[Encoding]:
        """Encodings truncated to `length`. Tokenizing costs by the character, so a long text is first cut at a space, and
        tokenized whole only if that part does not fill the length: the result is the same."""
        tokenizer = self._at(length)
        encode = tokenizer.encode_batch if words else tokenizer.encode_batch_fast  # the fast one knows of no words
        size = (self.max_length if length is None else min(length, self.max_length)) - (self._marker is not None)
        try:
            parts = [_cut(text, CHARS_PER_TOKEN * size) for text in texts] if self._cuts else list(texts)
            encodings = encode(parts)
            short = [i for i, part in enumerate(parts) if len(part) < len(texts[i]) and len(encodings[i]) < size]
            for i, whole in zip(short, encode([texts[i] for i in short]), strict=True):
                encodings[i] = whole
        except TypeError as error:
            raise DataError(_complaint(texts) or str(error)) from error
        return encodings


def _cut(text: str, chars: int) -> str:
    if len(text) <= chars:
        return text
    space = re.compile(r"[ \n]").search(text, chars)
    return text[: space.start()].rstrip(" \n\t\r") if space else text


def _complaint(texts: Sequence[object]) -> str | None:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {i} of {len(texts)} is a {type(text).__name__}; expected a string"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return f"text {i} of {len(texts)} is not valid Unicode (it holds half of a surrogate pair): {text[:40]!r}"
    return None


def _splits_at_spaces(pre_tokenizer: dict | None) -> bool:
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(_splits_at_spaces(part) for part in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] in SPACE_SPLITTERS or (pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer["use_regex"])

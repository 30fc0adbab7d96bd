"""Strings -> token ids and masks for one tower: tokenizer files, prompts, truncation, padding.

Also writes tokenizers where transformers and sentence-transformers read them, and trains new ones. Does not choose lengths
or order; batches.py and the encoder do.
"""

import collections
import dataclasses
import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedjax.config.errors import ConfigError, DataError, nearest
from embedjax.config.late import Late, Side
from embedjax.config.model import side_of

# What a tokenizer is made of in the folders people share; "*.model" is sentencepiece.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "*.model",
)  # fmt: skip
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# Pre-tokenizers after which no token spans a space, so the tokens before a space do not depend on what follows it.
SPACE_SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
CLEANINGS: dict[str, list[normalizers.Normalizer]] = {  # by open_clip's names
    "whitespace": [],
    "lower": [normalizers.Lowercase(), *SPACES],
    "canonicalize": [
        normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Lowercase(), *SPACES,
    ],
}  # fmt: skip
CHARS_PER_TOKEN = 6  # characters tried first for each token wanted; English has 4 to 5, code 4


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
        if self.fills or self._expands:
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

    def lengths(self, texts: Sequence[str], prompt: str | None = None) -> Int32[np.ndarray, " N"]:
        """Number of tokens of each text after truncation to `max_length`, prompt and special tokens included."""
        if self.fills or self._expands:
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


# Files


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """The tokenizer of a folder, a tokenizer.json or a hub id, without the truncation and padding stored with it.

    tokenizer.json is preferred; a folder of another kind is converted. Raises ConfigError when there is none.
    """
    place = _place(path_or_hub_id)
    file = place if place.is_file() else place / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (vocabulary := _bert_vocabulary(place / "vocab.txt")) is not None:
            tokenizer = _wordpiece(vocabulary, **_bert_options(place / "tokenizer_config.json"))
        else:
            tokenizer = _converted(place)
    except Exception as error:  # the Rust library raises plain Exception
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file if file.is_file() else place}: the tokenizer cannot be read: {reason}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if cleaning := _cleaning(place):
        parts = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*cleaning, *parts])
    return tokenizer


def _cleaning(place: Path) -> list[normalizers.Normalizer]:
    """What open_clip does to a text before a folder's tokenizer sees it, as far as its config asks for it: SigLIP's texts have
    no capitals and no punctuation. The repair of broken characters, which it does to every text, is left out."""
    file = place / "open_clip_config.json"
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        how = ((config.get("model_cfg") or {}).get("text_cfg") or {}).get("tokenizer_kwargs", {}).get("clean", "whitespace")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not readable: {' '.join(str(error).split())}") from error
    if how not in CLEANINGS:
        raise ConfigError(f"{file}: clean is {how!r}; {nearest(str(how), CLEANINGS)}")
    return CLEANINGS[how]


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, *, max_length: int, source: str | Path | None = None, fills: bool = False
) -> None:
    """Write a tokenizer so that transformers and sentence-transformers load it from `folder`.

    Files of `source`, the folder or tokenizer.json (or hub id) it was loaded from, are copied as they are; what they lack
    is written. `max_length` becomes the tokenizer's model_max_length. With `fills` padding is not told from text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        _copy(_place(source), folder)
    written = folder / "tokenizer.json"
    if not written.exists() or (source is not None and (_cleaning(_place(source)) or _lacks_tokens(written, tokenizer))):
        tokenizer.save(str(written))
    config_file = folder / "tokenizer_config.json"
    tokens = {
        role: next((name for name in names if tokenizer.token_to_id(name) is not None), None) for role, names in ROLES.items()
    }
    tokens = {role: token for role, token in tokens.items() if token is not None}
    if source is None and isinstance(tokenizer.model, models.WordPiece):
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in by_id), encoding="utf-8")
    if not (folder / "special_tokens_map.json").exists():
        _write_json(folder / "special_tokens_map.json", tokens)
    config = json.loads(config_file.read_text("utf-8")) if config_file.exists() else {**_class(tokenizer), **tokens}
    unmasked = {"model_input_names": ["input_ids"]} if fills else {}
    _write_json(config_file, {**config, **unmasked, "model_max_length": max_length})


def _lacks_tokens(file: Path, tokenizer: Tokenizer) -> bool:
    """Whether a file is of the tokenizer as it was before tokens were added."""
    return Tokenizer.from_file(str(file)).get_vocab_size() < tokenizer.get_vocab_size()


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[str], vocab_size: int) -> None:
    """Adds the tokens that a tokenizer lacks. Raises ConfigError where the table of `vocab_size` rows has no room for them."""
    new = [token for token in dict.fromkeys(tokens) if token and tokenizer.token_to_id(token) is None]
    if (size := tokenizer.get_vocab_size()) + len(new) > vocab_size:
        raise ConfigError(
            f"the tokenizer has {size} tokens and not {', '.join(map(repr, new))}, for which the tower's vocab_size of "
            f"{vocab_size} has no room; choose markers that the tokenizer has"
        )
    tokenizer.add_tokens(new)


def save_truncating(tokenizer: Tokenizer, folder: str | Path, *, max_length: int) -> None:
    """Write a tokenizer.json that cuts texts by itself, for readers who know no other limit: those of static tables."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(max_length)
    copy.save(str(Path(folder) / "tokenizer.json"))


def _class(tokenizer: Tokenizer) -> dict[str, object]:
    """The class of tokenizer_config.json, by names that transformers 4 and 5 both know."""
    normalizer = tokenizer.normalizer
    if not isinstance(tokenizer.model, models.WordPiece) or not isinstance(normalizer, normalizers.BertNormalizer):
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(place: Path, folder: Path) -> None:
    if place.is_file():
        shutil.copyfile(place, folder / "tokenizer.json")
        return
    for pattern in FILES:
        for file in place.glob(pattern):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)


def _place(path_or_hub_id: str | Path) -> Path:
    """The local file or folder, or the tokenizer's files fetched from the hub."""
    place = Path(path_or_hub_id).expanduser()
    if place.exists():
        return place
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ConfigError(f"the tokenizer {name!r} does not exist (and is no hub id of the form org/name)")
    import huggingface_hub  # costs a third of a second, and only hub ids need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES, "config.json"]))
    except Exception as error:  # whatever HTTP library the hub's client uses has its own errors
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the tokenizer {name!r} is no local path and could not be fetched from the hub: {reason}") from error


def _bert_vocabulary(file: Path) -> dict[str, int] | None:
    """Token -> id of a vocab.txt with BERT's special tokens, a token a line; None if it is something else."""
    if not file.is_file():
        return None
    lines = file.read_text("utf-8").split("\n")
    vocabulary = {token.rstrip("\r"): i for i, token in enumerate(lines if lines[-1] else lines[:-1])}
    return vocabulary if vocabulary.keys() >= set(BERT_SPECIALS) else None


def _bert_options(file: Path) -> dict[str, Any]:
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
    }


def _converted(place: Path) -> Tokenizer:
    if not any(list(place.glob(name)) for name in ("vocab.*", "*.model")):
        raise ConfigError(f"{place} has no tokenizer: no tokenizer.json, vocabulary or sentencepiece model")
    from transformers import AutoTokenizer  # costs a second, and only old folders need it

    tokenizer = getattr(AutoTokenizer.from_pretrained(place, local_files_only=True), "backend_tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"{place}: its tokenizer exists in Python only; convert it to a tokenizer.json")
    return tokenizer


# Training


def train_wordpiece(texts: Iterable[str], vocab_size: int, *, lowercase: bool = True) -> Tokenizer:
    """A BERT tokenizer with at most `vocab_size` pieces of the texts' words; [PAD] is 0. The same texts give the same pieces.

    Raises ConfigError for a vocabulary smaller than the alphabet, DataError without text.
    """
    texts = list(texts)
    words = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(texts, normalizers.BertNormalizer(lowercase=lowercase), max(64, vocab_size // 10))
    if not alphabet:
        raise DataError("there is no text to train a tokenizer on")
    inside = [f"##{letter}" for letter in alphabet if len(words.pre_tokenize_str("a" + letter)) == 1]
    # The trainer numbers letters inside words in the order of a hash map that differs from run to run, and breaks ties by
    # these numbers. Naming them as special tokens fixes the numbers; the tokenizer made of the vocabulary has them as pieces.
    fixed = [*BERT_SPECIALS, *alphabet, *inside]
    if vocab_size < len(fixed):
        raise ConfigError(f"vocab_size is {vocab_size}; a tokenizer of this text needs at least {len(fixed)}")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    counter = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    counter.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counter.pre_tokenizer = words
    counter.train_from_iterator(texts, trainer)
    return _wordpiece(counter.get_vocab(), lowercase=lowercase)


def _alphabet(texts: Iterable[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The `limit` most frequent letters of the normalised texts, in order."""
    raw: collections.Counter[str] = collections.Counter()
    for text in texts:
        raw.update(text)
    counts: collections.Counter[str] = collections.Counter()
    for letter, count in raw.items():
        for normal in normalizer.normalize_str(letter):
            if not normal.isspace():
                counts[normal] += count
    return sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])


def _wordpiece(
    vocabulary: dict[str, int], *, lowercase: bool, strip_accents: bool | None = None, handle_chinese_chars: bool = True
) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=handle_chinese_chars, strip_accents=strip_accents, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT_SPECIALS))
    return tokenizer

"""Tokenizers: read from the folders people share, written where transformers and sentence-transformers read them, trained."""

import collections
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedjax.config.errors import ConfigError, DataError, nearest

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
SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
CLEANINGS: dict[str, list[normalizers.Normalizer]] = {  # by open_clip's names
    "whitespace": [],
    "lower": [normalizers.Lowercase(), *SPACES],
    "canonicalize": [
        normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Lowercase(), *SPACES,
    ],
}  # fmt: skip


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
    if not written.exists() or (source is not None and (_cleaning(_place(source)) or _other_tokens(written, tokenizer))):
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


def _other_tokens(file: Path, tokenizer: Tokenizer) -> bool:
    """Whether a file is of the tokenizer as it was before tokens were added, or made special."""
    told = [
        {n: (token.content, token.special) for n, token in each.get_added_tokens_decoder().items()}
        for each in (Tokenizer.from_file(str(file)), tokenizer)
    ]
    return told[0] != told[1]


def with_special(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """A copy that finds these tokens in a text as they are written."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens if token])
    return copy


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

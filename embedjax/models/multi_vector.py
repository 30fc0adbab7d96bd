"""Late interaction as sentence-transformers keeps it from 6.0 on: the projections, what is compared and the scaling to length 1
are modules of token vectors, the lengths and the filling of queries are settings of the encoder, and markers are prompts that
begin with a special token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedjax.config import ROLES, Late, Tower
from embedjax.config.errors import ConfigError, said_by
from embedjax.config.late import Side
from embedjax.models.jsonfile import get, read_json

MODEL_TYPE, SIMILARITY = "MultiVectorEncoder", "maxsim"
SETTINGS = ("query_length", "document_length", "query_expansion")
"""What the settings of an encoder say of queries and documents."""
TOKENS = "token_embeddings"
MASK_TOKENS = ("[MASK]", "<mask>")
PLACE = "sentence_transformers."
CLASSES = {
    "Transformer": f"{PLACE}base.modules.transformer.Transformer",
    "Dense": f"{PLACE}base.modules.dense.Dense",
    "MultiVectorMask": f"{PLACE}multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "Normalize": f"{PLACE}base.modules.normalize.Normalize",
}
"""The modules of such a folder by their kinds."""
WHERE = {"module_input_name": TOKENS, "module_output_name": TOKENS}
"""What the config of a module says that works on token vectors."""
SPLITTING = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
"""Pre-tokenizers that pass over the space before a word."""


# Reading


def read_late(encoder: dict[str, Any], *, longest: int, skip: tuple[str, ...], file: Path) -> Late:
    """How queries and documents are made but for their markers, of what the `file` of the encoder says; texts are of at most
    `longest` tokens where it is silent. Raises ConfigError for what is not supported."""
    asked = get(encoder, "processing_kwargs", dict, {}, file=file)
    if odd := [key for key in ("common", "text") if asked.get(key)]:
        raise ConfigError(
            f"{file}: processing_kwargs of {odd[0]!r} are not supported; its lengths are query_length and document_length"
        )
    lengths = {f"{side}_length": get(encoder, f"{side}_length", int, longest, file=file) for side in ROLES}
    with said_by(file):
        late = Late("", "", **lengths, expand=False, skip=skip)
    if (filling := get(encoder, "query_expansion", dict, None, file=file)) is None:
        return late
    strategy, token = (get(filling, key, str, "", file=file) for key in ("strategy", "token"))
    if strategy != "fixed":
        raise ConfigError(f"{file}: query_expansion strategy {strategy!r} is not supported; queries are of one length, 'fixed'")
    if token and token not in MASK_TOKENS:
        raise ConfigError(f"{file}: query_expansion token {token!r} is not supported; expected {' or '.join(MASK_TOKENS)}")
    length = get(filling, "length", int, 0, file=file)
    attend = get(filling, "attend", bool, False, file=file)
    with said_by(file):
        return dataclasses.replace(late, query_length=length, expand=True, attend=attend)


def read_skip(folder: Path) -> tuple[str, ...]:
    """The tokens of documents that are not compared. Raises ConfigError for other masks."""
    file = folder / "config.json"
    config = read_json(file)
    words = get(config, "skiplist_words", list, [], file=file)
    sides = get(config, "skiplist_tasks", list, ["document"], file=file)
    if words and sides != ["document"]:
        raise ConfigError(f"{file}: skiplist_tasks {sides} is not supported; tokens are skipped in documents alone")
    if get(config, "keep_only_token_ids", list, [], file=file):
        raise ConfigError(f"{file}: keep_only_token_ids is not supported; late interaction here is of texts")
    return tuple(map(str, words))


def check_scale(folder: Path) -> None:
    """Raises ConfigError for a module that does not scale token vectors."""
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    found = {key: config.get(key, "sentence_embedding") for key in WHERE}
    if found != WHERE:
        raise ConfigError(f"{file} scales {found['module_input_name']}; late interaction compares {TOKENS} of length 1")


def split_prompts(prompts: Mapping[str, str], tokenizer: Path) -> tuple[dict[str, str], dict[Side, str]]:
    """(the prompts without markers, the marker of each side) of prompts that hold them. Where some prompts have none of their
    side's, all stay as they are and there are no markers: the tokens are the same."""
    tokens, splits = _special_tokens(tokenizer)
    begins = lambda text: max((token for token in tokens if text.startswith(token)), key=len, default="")
    markers: dict[Side, str] = {side: begins(prompts.get(side, "")) for side in ("query", "document")}
    bare: dict[str, str] = {}
    for name, text in prompts.items():
        side = side_of_prompt(name)
        marker = markers[side] if side else ""
        if any(markers.values()) and (side is None or not text.startswith(marker)):
            return dict(prompts), {"query": "", "document": ""}
        rest = text.removeprefix(marker)
        bare[name] = "" if rest.isspace() and splits else rest
    return bare, markers


def side_of_prompt(name: str) -> Side | None:
    """The side of a search that a prompt is of by its name, None for one of both."""
    sides: tuple[Side, ...] = ("query", "document")
    return next((side for side in sides if name == side or name.endswith(f"-{side}")), None)


def _special_tokens(folder: Path) -> tuple[Sequence[str], bool]:
    """(the tokens that a tokenizer finds in a text as it is written, whether it passes over spaces)."""
    file = folder / "tokenizer.json"
    tokenizer = read_json(file) if file.exists() else {}
    added = get(tokenizer, "added_tokens", list, [], file=file)
    whole = [each for each in added if isinstance(each, dict) and each.get("special") and not each.get("normalized")]
    found = [get(each, "content", str, "", file=file) for each in whole]
    return [token for token in found if token], get(tokenizer, "pre_tokenizer", dict, {}, file=file).get("type") in SPLITTING


# Writing


def encoder_settings(late: Late) -> dict[str, Any]:
    """What the settings of the encoder say of queries and documents."""
    filling = {"strategy": "fixed", "attend": late.attend, "token": None, "length": late.query_length}
    queries = {"query_expansion": filling} if late.expand else {"query_length": late.query_length}
    return {**queries, "document_length": late.document_length}


def marked_prompts(tower: Tower) -> dict[str, str]:
    """The prompts of a tower with the markers before them. Raises ConfigError for a prompt that is of queries and documents
    both, which have markers of their own."""
    assert tower.late is not None
    prompts, chosen = dict(tower.prompts or {}), tower.default_prompt
    default = prompts[chosen] if chosen else ""
    if chosen and side_of_prompt(chosen) is None:
        del prompts[chosen]
    marked = {}
    for name, text in (dict.fromkeys(ROLES, default) | prompts).items():
        side = side_of_prompt(name)
        if side is None and (tower.late.query_marker or tower.late.document_marker):
            raise ConfigError(
                f"the prompt {name!r} is of queries and documents, whose markers differ, and sentence-transformers keeps "
                f"markers in the prompts: call it {name}-query and {name}-document, or export as pylate"
            )
        marked[name] = (tower.late.marker(side) if side else "") + text
    return marked

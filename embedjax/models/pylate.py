"""Late interaction as PyLate keeps it: a Transformer and projections of every token, in a folder like sentence-transformers'
with keys of its own among the settings of the whole model. Normalisation and masks are not in the folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

from embedjax.config import Late, Tower
from embedjax.config.errors import ConfigError, said_by
from embedjax.models.jsonfile import get

MODEL_TYPE, SIMILARITY = "ColBERT", "MaxSim"
KEYS = {
    "query_prefix": "query_marker",
    "document_prefix": "document_marker",
    "query_length": "query_length",
    "document_length": "document_length",
    "do_query_expansion": "expand",
    "attend_to_expansion_tokens": "attend",
    "skiplist_words": "skip",
}
"""PyLate's key among the settings -> ours of `Late`."""
PLAIN = Late(query_marker="[Q] ", document_marker="[D] ")
"""What PyLate takes where a folder says nothing."""


def read_late(settings: dict[str, Any], *, file: Path) -> Late:
    """How a folder's queries and documents are made. Raises ConfigError for a similarity that is not MaxSim, and for values of
    the wrong kind."""
    if (similarity := get(settings, "similarity_fn_name", str, SIMILARITY, file=file)) != SIMILARITY:
        raise ConfigError(f"{file}: similarity_fn_name {similarity!r} is not supported; late interaction has {SIMILARITY!r}")
    found: dict[str, Any] = {}
    for theirs, ours in KEYS.items():
        default = getattr(PLAIN, ours)
        kind = list if isinstance(default, tuple) else type(default)
        value = get(settings, theirs, kind, None, file=file)
        if value is not None:
            found[ours] = tuple(map(str, value)) if kind is list else value
    if not found.get("expand", True):
        found["attend"] = False  # of tokens that are not there
    with said_by(file):
        return dataclasses.replace(PLAIN, **found)


def settings_of(tower: Tower) -> dict[str, Any]:
    """The settings of a folder, but for versions and prompts."""
    assert tower.late is not None
    value = lambda x: list(x) if isinstance(x, tuple) else x
    own = {theirs: value(getattr(tower.late, ours)) for theirs, ours in KEYS.items()}
    return {"model_type": MODEL_TYPE, "similarity_fn_name": SIMILARITY, **own}

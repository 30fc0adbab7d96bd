"""RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2020): BERT's tower and names under another prefix."""

import dataclasses
from typing import Any

from embedjax.config.model import Roberta
from embedjax.models.families import bert
from embedjax.models.families.bert import Tower, longest, sizes

__all__ = ["Tower", "from_hf", "longest", "names", "sizes", "to_hf"]

names = dataclasses.replace(bert.names, prefix="roberta.")


def from_hf(config: dict[str, Any]) -> Roberta:
    """The architecture a config.json describes."""
    pad_id, types = config.get("pad_token_id"), config.get("type_vocab_size", 2)
    fields = bert.fields_from_hf(config)
    return Roberta(**fields, token_types=types, pad_id=1 if pad_id is None else pad_id, model_type=config["model_type"])


def to_hf(arch: Roberta) -> dict[str, Any]:
    """The config.json of an architecture."""
    name = {"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}[arch.model_type]
    kind = {"architectures": [name], "model_type": arch.model_type, "position_embedding_type": "absolute"}
    return kind | bert.fields_to_hf(arch) | {"type_vocab_size": arch.token_types}

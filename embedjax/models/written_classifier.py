"""A tower and a class head -> one folder of transformers' ...ForSequenceClassification, as servers of classes read it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from embedjax.config import Tower
from embedjax.models import sequence_classification
from embedjax.models.classifier import Head
from embedjax.models.families import names_of
from embedjax.models.written import encoder_files, new_folder, write_json, write_length, write_tensors


def write_classifier(
    folder: str | Path,
    tower: Tower,
    params: Mapping[str, Any],
    name: str,
    head: Head,
    *,
    write_tokenizer: Callable[[Path], object],
    replace: bool = False,
) -> Path:
    """Write a folder of a resolved tower, its parameters {"encoder", "dense"} and the head of a name; returns the folder.

    Raises ConfigError for a tower or parameters of another form, otherwise as `write_sentence_transformers`.
    """
    sequence_classification.check_tower("text", tower)
    assert tower.arch is not None
    with new_folder(Path(folder), replace) as root:
        config, encoder = encoder_files(tower, params)
        prefix = names_of(tower.arch).prefix
        tensors = {prefix + key: tensor for key, tensor in encoder.items()}
        tensors |= sequence_classification.to_tensors(tower.arch, params, head)
        write_json(root / "config.json", config | sequence_classification.described(tower, name, head))
        write_length(root, tower)
        write_tensors(root / "model.safetensors", tensors)
        write_tokenizer(root)
    return Path(folder)

"""A tower of late interaction and its parameters -> the folders that PyLate and sentence-transformers load.

`written.py` does the same for one vector a text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from embedjax.config import Tower
from embedjax.models import multi_vector, pylate
from embedjax.models.layout import SETTINGS
from embedjax.models.modules import ENCODER_CONFIGS
from embedjax.models.written import (
    VERSIONS,
    new_folder,
    prompts_of,
    write_encoder,
    write_json,
    write_modules,
    write_projections,
)

FIRST = VERSIONS | {"sentence_transformers": "6.0.0"}
"""The oldest that read a multi-vector folder."""


def write_pylate(
    folder: str | Path,
    tower: Tower,
    params: Mapping[str, Any],
    *,
    write_tokenizer: Callable[[Path], object],
    replace: bool = False,
) -> Path:
    """Write a PyLate folder, which sentence-transformers reads too: from 6.0.1 on, for 6.0.0 loses markers beside prompts.
    Otherwise as `written.write_sentence_transformers`."""
    with new_folder(Path(folder), replace) as root:
        write_encoder(root, tower, params, write_tokenizer)
        write_json(root / ENCODER_CONFIGS[0], {"max_seq_length": tower.max_length, "do_lower_case": False})
        modules = [("Transformer", "")]
        write_projections(root, modules, tower, params, "pylate.models.Dense.Dense")
        write_modules(root, modules)
        prompts = {"prompts": prompts_of(tower), "default_prompt_name": tower.default_prompt or None}
        write_json(root / SETTINGS, {"__version__": VERSIONS, **prompts, **pylate.settings_of(tower)})
    return Path(folder)


def write_multi_vector(
    folder: str | Path,
    tower: Tower,
    params: Mapping[str, Any],
    *,
    write_tokenizer: Callable[[Path], object],
    replace: bool = False,
) -> Path:
    """Write a folder that MultiVectorEncoder of sentence-transformers 6.0 and later loads. The tokenizer must know the markers
    as special tokens, for they stand in the prompts. Otherwise as above; ConfigError too for prompts that cannot hold them."""
    assert tower.late is not None
    with new_folder(Path(folder), replace) as root:
        write_encoder(root, tower, params, write_tokenizer)
        said = {"transformer_task": "feature-extraction", "max_seq_length": tower.max_length}
        write_json(root / ENCODER_CONFIGS[0], {**said, **multi_vector.encoder_settings(tower.late)})
        modules = [(multi_vector.CLASSES["Transformer"], "")]
        write_projections(root, modules, tower, params, multi_vector.CLASSES["Dense"], **multi_vector.WHERE)
        masks = {"skiplist_words": list(tower.late.skip), "skiplist_tasks": ["document"], "keep_only_token_ids": None}
        for kind, config in (("MultiVectorMask", masks), ("Normalize", multi_vector.WHERE)):
            modules.append((multi_vector.CLASSES[kind], f"{len(modules)}_{kind}"))
            (root / modules[-1][1]).mkdir()
            write_json(root / modules[-1][1] / "config.json", config)
        write_modules(root, modules)
        prompts = {"prompts": multi_vector.marked_prompts(tower), "default_prompt_name": None}
        kind = {"model_type": multi_vector.MODEL_TYPE, "similarity_fn_name": multi_vector.SIMILARITY}
        write_json(root / SETTINGS, {"__version__": FIRST, **prompts, **kind})
    return Path(folder)

"""The architectures, by the name Hugging Face knows them by.

Each is a module with the same names: `Tower`, made as Tower(arch, compute=..., remat=..., layers=..., still=...); `names`, its
table of names, and `sizes(arch)`, the axis letters it speaks of; `from_hf(config)` and `to_hf(arch)`, config.json ->
architecture and back, which a static table has not. Those of texts have `longest(arch)`, the most tokens a text may have. Those
of pictures have `pool(arch, encoder, tokens, compute=...)`, whose parameters are a part of the encoder's, and
`resized(encoder, old, new)`, an encoder for pictures of another size; their `names(arch)` depends on the architecture's form. A
tower with running statistics holds them beside its parameters, as "mean" and "var"; applied without, it normalises by the batch
and returns the batch's.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from embedjax.config.errors import ConfigError
from embedjax.config.image import ImageArchitecture, Vit
from embedjax.config.model import (
    Architecture,
    Bert,
    ClipText,
    DistilBert,
    ModernBert,
    Mpnet,
    Roberta,
    SiglipText,
    Static,
)
from embedjax.config.resnet import ModifiedResnet, Resnet
from embedjax.models.families import (
    bert,
    clip_text,
    distilbert,
    modernbert,
    modified_resnet,
    mpnet,
    resnet,
    roberta,
    siglip_text,
    static,
    vit,
)
from embedjax.models.names import Names

FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
    "roberta": roberta,
    "xlm-roberta": roberta,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "modernbert": modernbert,
    "clip_text_model": clip_text,
    "siglip_text_model": siglip_text,
}

IMAGE_FAMILIES: dict[str, ModuleType] = {
    "vit": vit,
    "clip_vision_model": vit,
    "siglip_vision_model": vit,
    "resnet": resnet,
}

_BY_ARCH: dict[type[Architecture | ImageArchitecture], ModuleType] = {
    Bert: bert,
    Roberta: roberta,
    DistilBert: distilbert,
    Mpnet: mpnet,
    ModernBert: modernbert,
    ClipText: clip_text,
    SiglipText: siglip_text,
    Static: static,
    Vit: vit,
    ModifiedResnet: modified_resnet,
    Resnet: resnet,
}


def family_of(arch: Architecture | ImageArchitecture) -> ModuleType:
    """The family of an architecture."""
    return _BY_ARCH[type(arch)]


def names_of(arch: Architecture | ImageArchitecture) -> Names:
    """The table of names of an architecture."""
    found = family_of(arch).names
    return found if isinstance(found, Names) else found(arch)


def described(family: ModuleType, config: Mapping[str, Any], *, file: str | Path) -> Any:
    """The architecture that a config.json of a family describes; whatever is wrong with it is a ConfigError that names the
    file."""
    kind = config.get("model_type")
    try:
        arch = family.from_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{file} has no {error}, which a {kind} needs") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} does not describe a {kind}: {error}") from error
    typed(arch, file=file)
    return arch


def typed(arch: Any, *, file: str | Path) -> None:
    """Raises ConfigError, under the name of a file, for numbers of an architecture that are of another type."""
    for field in dataclasses.fields(arch):
        value, number = getattr(arch, field.name), {int: (int,), float: (int, float)}.get(field.type)
        if number and (type(value) not in number or not math.isfinite(value)):
            raise ConfigError(
                f"{file}: {value!r} ({field.name}) should be of type {getattr(field.type, '__name__', field.type)}"
            )

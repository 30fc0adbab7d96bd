"""The architectures, by the name Hugging Face knows them by.

Each is a module with the same names: `Tower`, made as Tower(arch, compute=..., remat=..., layers=...); `names`, its table of
names, and `sizes(arch)`, the axis letters it speaks of; `from_hf(config)` and `to_hf(arch)`, config.json -> architecture and
back, which a static table has not. Those of texts have `longest(arch)`, the most tokens a text may have. Those of pictures have
`pool(arch, encoder, tokens, compute=...)`, whose parameters are a part of the encoder's, and `resized(encoder, old, new)`, an
encoder for pictures of another size; their `names(arch)` depends on the architecture's form.
"""

from types import ModuleType

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
from embedjax.models.families import bert, clip_text, distilbert, modernbert, mpnet, roberta, siglip_text, static, vit
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
}


def family_of(arch: Architecture | ImageArchitecture) -> ModuleType:
    """The family of an architecture."""
    return _BY_ARCH[type(arch)]


def names_of(arch: Architecture | ImageArchitecture) -> Names:
    """The table of names of an architecture."""
    found = family_of(arch).names
    return found(arch) if callable(found) else found

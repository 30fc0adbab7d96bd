"""The text architectures, by the name Hugging Face knows them by.

Each is a module with the same names: `Tower`, made as Tower(arch, compute=..., remat=..., layers=..., still=...); `names`, its
table of names, and `sizes(arch)`, the axis letters it speaks of; `longest(arch)`, the most tokens a text may have;
`from_hf(config)` and `to_hf(arch)`, config.json -> architecture and back, which a static table has not.
"""

from types import ModuleType

from embedjax.config.model import Architecture, Bert, DistilBert, ModernBert, Mpnet, Roberta, Static
from embedjax.models.families import bert, distilbert, modernbert, mpnet, roberta, static

FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
    "roberta": roberta,
    "xlm-roberta": roberta,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "modernbert": modernbert,
}

_BY_ARCH: dict[type[Architecture], ModuleType] = {
    Bert: bert,
    Roberta: roberta,
    DistilBert: distilbert,
    Mpnet: mpnet,
    ModernBert: modernbert,
    Static: static,
}


def family_of(arch: Architecture) -> ModuleType:
    """The family of an architecture."""
    return _BY_ARCH[type(arch)]

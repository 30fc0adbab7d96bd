"""SigLIP's text tower (Zhai et al. 2023): CLIP's, without its causal mask.

It was trained on texts padded to one length, whose padding counts: `arch.fills` has the tokens made so. The projection of the
pooled vector, which Hugging Face calls `head`, is a projection of the tower's head (`models/clip.py` reads and writes it).
"""

from typing import Any

from embedjax.config.model import SiglipText
from embedjax.models.families import clip_text
from embedjax.models.families.clip_text import Tower, longest, names, sizes

__all__ = ["Tower", "from_hf", "longest", "names", "sizes", "to_hf"]


def from_hf(config: dict[str, Any]) -> SiglipText:
    """The architecture a config.json of a text tower describes; what it leaves out is as in transformers' defaults."""
    return SiglipText(**clip_text.fields_from_hf(config, SiglipText()))


def to_hf(arch: SiglipText) -> dict[str, Any]:
    """The config.json of an architecture."""
    kind = {"architectures": ["SiglipTextModel"], "model_type": "siglip_text_model"}
    return kind | clip_text.fields_to_hf(arch) | {"projection_size": arch.width}

"""Losses that need no labels: words are hidden or left out, and told from the rest. Sets have the column anchor alone."""

import dataclasses
from typing import ClassVar

from embedjax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MaskedLanguage:
    """Masked language modelling (Devlin et al. 2018, section 3.1): hidden tokens are told from the others. Of the tokens that
    are chosen 80 % become the mask token, 10 % a random one, 10 % stay. Trains a tower from scratch; its head is not exported.
    """

    words: ClassVar[bool] = True  # batches number the word of each token

    share: float = 0.15
    """Share of the tokens, or words, that are chosen."""
    whole_words: bool = False
    """Choose all pieces of a word or none."""
    mask_id: int | None = None
    """Id of the mask token; None asks the tower's tokenizer."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ConfigError(f"MaskedLanguage.share is {self.share}; it must be above 0 and below 1")
        if self.mask_id is not None and self.mask_id < 0:
            raise ConfigError(f"MaskedLanguage.mask_id is {self.mask_id}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class DenoisingAutoEncoder:
    """TSDAE (Wang et al. 2021, section 3.1): a decoder with the tower's own layers writes the text again from the one vector of
    a copy that words were deleted from. BERT and RoBERTa towers; pooling "cls" is what the paper found best."""

    words: ClassVar[bool] = True  # batches number the word of each token

    deleted: float = 0.6
    """Share of the words that are deleted; at least one stays."""

    def __post_init__(self):
        if not 0 <= self.deleted < 1:
            raise ConfigError(f"DenoisingAutoEncoder.deleted is {self.deleted}; it must be at least 0 and below 1")

"""Which loss a data set is trained with: a union of dataclasses, one a loss."""

import dataclasses

from embedjax.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MultipleNegatives:
    """Multiple negatives ranking: softmax of each anchor over all positives and hard negatives of the global batch."""

    scale: float = 20.0
    """Factor on the cosine similarity: 1 / temperature."""
    learn_scale: bool = False
    """Train the logarithm of the scale, held in [0, ln 100]."""
    mask_duplicates: bool = True
    """Do not count a text equal to the positive, or the positive of an equal anchor, as a negative."""

    def __post_init__(self):
        if not self.scale > 0:
            raise ConfigError(f"MultipleNegatives.scale is {self.scale}; it must be above 0")


Loss = MultipleNegatives

"""Named towers of texts and pictures, and which column each one encodes: the model."""

import dataclasses
import re

from embedjax.config.errors import ConfigError, nearest
from embedjax.config.image import ImageTower
from embedjax.config.model import ROLES, TEXTS, Similarity, Tower


@dataclasses.dataclass(frozen=True)
class Model:
    """Named towers, and which column each one encodes."""

    towers: dict[str, Tower | ImageTower] = dataclasses.field(default_factory=dict)
    """Towers by name."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tower of each column, such as {"anchor": "query", "positive": "document"}, whose tower encodes negatives too; with one
    tower that encodes every column is its."""

    def __post_init__(self):
        for name in self.towers:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"the tower {name!r} needs a name of letters, digits, '_', '.' and '-'")
        for column, name in self.columns.items():
            if column not in TEXTS:
                raise ConfigError(f"model.columns has no column {column!r}; {nearest(column, TEXTS)}")
            if name not in self.towers:
                raise ConfigError(f"model.columns gives {column!r} to tower {name!r}; {nearest(name, self.towers)}")

    @property
    def texts(self) -> dict[str, Tower]:
        """The towers of texts."""
        return {name: tower for name, tower in self.towers.items() if isinstance(tower, Tower)}

    @property
    def encoders(self) -> tuple[str, ...]:
        """The towers that encode a column: all but those that only guide a loss."""
        return tuple(sorted(set(self.columns.values()) or self.towers))

    @property
    def routes(self) -> dict[str, str]:
        """The towers of the finished model: {"text": name} for one, else {"query": name, "document": name}."""
        if len(self.encoders) == 1:
            return {"text": self.encoders[0]}
        return {role: self.tower_of(role) for role in ROLES}

    @property
    def similarity(self) -> Similarity:
        """How vectors are compared. Raises ConfigError when towers disagree."""
        found: dict[str, Similarity] = {name: self.towers[name].similarity or "cosine" for name in self.encoders}
        if len(set(found.values())) > 1:
            raise ConfigError(f"the towers' vectors are compared with each other, but their similarities differ: {found}")
        return found[self.encoders[0]]

    @property
    def late(self) -> bool:
        """Whether texts are compared by their tokens' vectors. Raises ConfigError when towers disagree."""
        found = {name: self.is_late(name) for name in self.encoders}
        if len(set(found.values())) > 1:
            raise ConfigError(f"the towers' texts are compared with each other, but not all by late interaction: {found}")
        return found[self.encoders[0]]

    def is_late(self, name: str) -> bool:
        """Whether a tower gives a vector a token."""
        tower = self.towers[name]
        return isinstance(tower, Tower) and tower.late is not None

    def tower_of(self, column: str) -> str:
        """The name of the tower that encodes a column. `negative_2` follows `negative`, and that, if it is not named,
        `positive`; "query" is the tower of anchors, "document" that of positives."""
        column = ROLES.get(column, column).partition("_")[0]
        if column == "negative" and column not in self.columns:
            column = "positive"
        if column in self.columns:
            return self.columns[column]
        if len(self.encoders) == 1:
            return self.encoders[0]
        raise ConfigError(f"model.columns names no tower for column {column!r}; it has {sorted(self.columns)}")

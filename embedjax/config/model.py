"""What towers of texts are made of: architectures, heads, adapters. Sizes never come from data."""

import dataclasses
import math
import re
from typing import Literal

from embedjax.config.errors import ConfigError
from embedjax.config.late import Late

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
PoolingName = Literal["mean", "cls", "max", "weightedmean", "lasttoken"]
Dtype = Literal["float32", "bfloat16"]
Similarity = Literal["cosine", "dot"]
Precision = Literal["float32", "float16", "bfloat16", "int8", "uint8", "binary", "ubinary"]
"""What the numbers of a stored vector are kept as; `embedjax.quantize` defines them."""

ROLES = {"query": "anchor", "document": "positive"}
"""The two sides of a search, and the column that trains the tower of each."""

TEXTS = ("anchor", "positive", "negative")
"""The columns of texts; negative stands for negative_2, ... too."""


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes every encoder has; each architecture below adds its own."""

    vocab_size: int = 30522
    """Rows of the token table (V). The tokenizer must not be larger."""
    width: int = 768
    """Width of the residual stream (D)."""
    depth: int = 12
    """Number of layers."""
    heads: int = 12
    """Attention heads (H); must divide the width."""
    mlp: int = 3072
    """Width inside the feed-forward part (F)."""
    positions: int = 512
    """Rows of the position table: the longest text (RoBERTa and MPNet spend pad_id + 1 of them)."""
    activation: Activation = "gelu"
    """Activation of the feed-forward part."""
    norm_eps: float = 1e-12
    """Added to the variance in layer normalisation."""
    dropout: float = 0.0
    """Dropout of the embeddings and of each part's output."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of random initial weights."""
    pad_id: int = 0
    """Token id of padding."""

    def __post_init__(self):
        for name in ("vocab_size", "width", "depth", "heads", "mlp", "positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"{type(self).__name__}: width {self.width} is not divisible by heads {self.heads}")
        for name in ("token_types", "relative_buckets", "global_every", "local_window"):
            if getattr(self, name, 1) < 1:
                raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be in [0, 1)")

    @property
    def fills(self) -> bool:
        """Whether texts are padded to max_length and padding counts as any token does."""
        return False


@dataclasses.dataclass(frozen=True)
class Bert(Transformer):
    """BERT (Devlin et al. 2018): post-norm, learned absolute positions, token types."""

    token_types: int = 2
    """Rows of the token-type table."""


@dataclasses.dataclass(frozen=True)
class Roberta(Transformer):
    """RoBERTa and XLM-R: BERT whose positions start at pad_id + 1 and count tokens that are not padding."""

    token_types: int = 1
    """Rows of the token-type table."""
    pad_id: int = 1
    """Token id of padding; positions start one after it."""
    norm_eps: float = 1e-5
    """Added to the variance in layer normalisation."""
    model_type: Literal["roberta", "xlm-roberta"] = "roberta"
    """Name Hugging Face knows the architecture by."""


@dataclasses.dataclass(frozen=True)
class DistilBert(Transformer):
    """DistilBERT (Sanh et al. 2019): BERT without token types."""

    sinusoidal: bool = False
    """Positions start from sines and cosines (they are trained all the same)."""


@dataclasses.dataclass(frozen=True)
class Mpnet(Transformer):
    """MPNet (Song et al. 2020): RoBERTa's positions and one relative position bias shared by all layers."""

    pad_id: int = 1
    """Token id of padding; positions start one after it."""
    norm_eps: float = 1e-5
    """Added to the variance in layer normalisation."""
    relative_buckets: int = 32
    """Buckets of the relative position bias."""


@dataclasses.dataclass(frozen=True)
class ModernBert(Transformer):
    """ModernBERT (Warner et al. 2024): pre-norm, RoPE, GeGLU, alternating local and global attention, no biases."""

    vocab_size: int = 50368
    """Rows of the token table (V). The tokenizer must not be larger."""
    depth: int = 22
    """Number of layers."""
    mlp: int = 1152
    """Width inside the feed-forward part (F); its input projection is twice as wide."""
    positions: int = 8192
    """Longest sequence, special tokens included."""
    norm_eps: float = 1e-5
    """Added to the variance in layer normalisation."""
    pad_id: int = 50283
    """Token id of padding."""
    global_every: int = 3
    """Every so many layers, counted from the first, attend globally."""
    local_window: int = 128
    """Width of the window of the other layers: half of it on each side."""
    global_theta: float = 160000.0
    """Base of the rotary positions of global layers."""
    local_theta: float = 10000.0
    """Base of the rotary positions of local layers."""


@dataclasses.dataclass(frozen=True)
class ClipText(Transformer):
    """CLIP's text tower (Radford et al. 2021): pre-norm and causal; a text's vector is that of its last token ("lasttoken")."""

    vocab_size: int = 49408
    """Rows of the token table (V). The tokenizer must not be larger."""
    width: int = 512
    """Width of the residual stream (D)."""
    heads: int = 8
    """Attention heads (H); must divide the width."""
    mlp: int = 2048
    """Width inside the feed-forward part (F)."""
    positions: int = 77
    """Rows of the position table: the longest text."""
    activation: Activation = "quick_gelu"
    """Activation of the feed-forward part."""
    norm_eps: float = 1e-5
    """Added to the variance in layer normalisation."""
    pad_id: int = 49407
    """Token id of padding."""
    eos_id: int = 49407
    """Token id that the tokenizer ends a text with: other readers of the folder pool where it stands first."""


@dataclasses.dataclass(frozen=True)
class SiglipText(Transformer):
    """SigLIP's text tower (Zhai et al. 2023): pre-norm; a text's vector is that of the last place ("lasttoken"), which is
    padding in most."""

    vocab_size: int = 32000
    """Rows of the token table (V). The tokenizer must not be larger."""
    positions: int = 64
    """Rows of the position table: the longest text."""
    activation: Activation = "gelu_tanh"
    """Activation of the feed-forward part."""
    norm_eps: float = 1e-6
    """Added to the variance in layer normalisation."""
    pad_id: int = 1
    """Token id of padding."""

    @property
    def fills(self) -> bool:
        """Whether texts are padded to max_length and padding counts as any token does."""
        return True


@dataclasses.dataclass(frozen=True)
class Static:
    """A table of token vectors and no layers: a text is the mean of its tokens' vectors, without special tokens. It encodes
    hundreds of times faster than a transformer (sentence-transformers' StaticEmbedding, model2vec)."""

    vocab_size: int = 30522
    """Rows of the token table (V). The tokenizer must not be larger."""
    width: int = 256
    """Width of the table (D)."""
    init_std: float = 0.02
    """Standard deviation of random initial vectors."""
    pad_id: int = 0
    """Token id of padding; its vector counts nowhere."""

    def __post_init__(self):
        for name in ("vocab_size", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Static.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return 0

    @property
    def fills(self) -> bool:
        """Whether texts are padded to max_length and padding counts as any token does."""
        return False


Architecture = Bert | Roberta | DistilBert | Mpnet | ModernBert | ClipText | SiglipText | Static


@dataclasses.dataclass(frozen=True)
class Dense:
    """A projection of the pooled vector."""

    features: int = 768
    """Width of the output."""
    bias: bool = True
    """Whether it adds a bias."""
    activation: Literal["tanh", "relu", "identity"] = "tanh"
    """Applied to the output. text-embeddings-inference reads no relu, but in DistilBERT's classifiers."""
    residual: bool = False
    """Whether its input is added to the output, by a matrix of its own where the widths differ."""

    def __post_init__(self):
        if self.features < 1:
            raise ConfigError(f"Dense.features is {self.features}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021): kernels W of the encoder become W + alpha / rank * A B; only A and B are trained."""

    rank: int = 8
    """Columns of A, rows of B."""
    alpha: float = 16.0
    """Strength: alpha / rank is the factor of A B."""
    paths: str = "attn/(query|value)/kernel$"
    """Regular expression of the encoder's kernels that are adapted; "blocks/" is all of them."""

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"Lora.rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"Lora.alpha is {self.alpha}; it must be above 0 and finite")
        try:
            re.compile(self.paths)
        except re.error as error:
            raise ConfigError(f"Lora.paths is {self.paths!r}, which is not a regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Tower:
    """A text tower: architecture, where its weights and tokenizer come from, pooling and head.

    None means "as the folder of `init` says", or the plain default when there is no such folder.
    """

    arch: Architecture | None = None
    """Architecture and its sizes; None reads them from `init`."""
    init: str = ""
    """Folder or hub id the weights start from; empty for random weights."""
    tokenizer: str = ""
    """Folder, tokenizer.json or hub id; empty for that of `init`; "wordpiece" trains one on the run's training text."""
    pooling: PoolingName | None = None
    """How token vectors become one vector (default mean)."""
    include_prompt: bool | None = None
    """Whether the prompt's tokens are pooled too (default yes)."""
    dense: tuple[Dense, ...] | None = None
    """Projections after pooling (default none)."""
    normalize: bool | None = None
    """Whether the vector is scaled to length 1 (default yes, but not where similarity is set to "dot")."""
    similarity: Similarity | None = None
    """How vectors are compared, in losses and in use: their cosine, or the plain product (default cosine). Losses with a
    `distance`, MegaBatchMargin and SupCon keep to their own."""
    max_length: int | None = None
    """Longest text in tokens, special tokens included (default 128, or the folder's)."""
    prompts: dict[str, str] | None = None
    """Prompt texts by name, stored with the model."""
    default_prompt: str | None = None
    """Name of the prompt put before every text when none is asked for; "" for none, also where the folder has one."""
    lowercase: bool = True
    """Whether a trained "wordpiece" tokenizer lowercases."""
    compute: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    layers: Literal["auto", "scan", "unroll"] = "auto"
    """How the layers are looped over; auto unrolls on a CPU and scans elsewhere."""
    lora: dict[str, Lora] = dataclasses.field(default_factory=dict)
    """Adapters by name, such as one a task. With any, the encoder itself is not trained."""
    freeze_layers: int = 0
    """With n, the tables (of tokens, positions, types and relative positions) and the first n layers are not trained, and have
    no backward pass; with all layers the whole encoder. 0 for none of them."""
    late: Late | None = None
    """Late interaction: a vector a token instead of one a text. Lengths are its own, and so is the default of `dense`; pooling
    counts for nothing."""

    def __post_init__(self):
        for name in self.lora:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"the adapter {name!r} of a tower needs a name of letters, digits, '_', '.' and '-'")
        if self.freeze_layers < 0:
            raise ConfigError(f"freeze_layers is {self.freeze_layers}; it must be at least 0")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}; it must be at least 1")
        if self.arch is None and not self.init:
            raise ConfigError("a tower needs `arch` (sizes) or `init` (a folder or hub id to start from)")
        if self.late and (self.similarity == "dot" or self.normalize is False):
            raise ConfigError("late interaction compares cosines of tokens; leave `similarity` and `normalize` as they are")

    @property
    def width(self) -> int:
        """Numbers of a vector; 0 while the tower is not resolved."""
        if self.dense:
            return self.dense[-1].features
        return self.arch.width if self.arch else 0

    def length_of(self, column: str) -> int:
        """Tokens of the longest text of a column; 0 while the tower is not resolved."""
        return self.late.length(side_of(column)) if self.late else self.max_length or 0

    def prompt_for(self, column: str, name: str = "") -> str | None:
        """The prompt's name for a column: that of a set or task by its `name`, where the tower has such; else "query" for
        anchors and "document" for the rest, where it has these; else the default prompt."""
        side = side_of(column)
        return self.prompt_named(name, column) or (side if side in (self.prompts or {}) else self.default_prompt or None)

    def prompt_named(self, name: str, column: str = "text") -> str | None:
        """The prompt that a set's or task's name means for a column: NAME-query for anchors or NAME-document for the rest, else
        NAME itself; None where the tower has none. A "text" is of neither side."""
        names = (name,) if column == "text" else (f"{name}-{side_of(column)}", name)
        return next((each for each in names if name and each in (self.prompts or {})), None)

    def knows(self, name: str) -> bool:
        """Whether a set's or task's name means an adapter or prompt here, be it that of one side."""
        return name in self.lora or any(self.prompt_named(name, column) for column in ("text", *ROLES))


def side_of(column: str) -> Literal["query", "document"]:
    """Which side of a search a column is on."""
    return "query" if ROLES.get(column, column) == "anchor" else "document"

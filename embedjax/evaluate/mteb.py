"""Our models for the library mteb, which runs its benchmarks on them: `mteb.evaluate(MtebEncoder("runs/my_run"), tasks)`.

Needs the extra `eval`. Implements mteb's EncoderProtocol (version 2) by its methods; nothing is inherited.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.evaluate.encode import encode, fingerprint
from embedjax.evaluate.tasks.side import comparable, pairwise, prefixed
from embedjax.load import Model, load

Vectors = Float[np.ndarray, "N E"]


class MtebEncoder:
    """A model, or the first `dim` numbers of its vectors, as mteb calls it."""

    def __init__(self, model: Model | str | Path, *, dim: int | None = None, mesh: DeviceMesh | None = None):
        self.model = model if isinstance(model, Model) else load(model)
        self.dim, self.mesh = dim, mesh

    def encode(self, inputs: Iterable[Mapping], *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> Vectors:
        """Vectors of batches of texts. Queries and documents are encoded by their towers, with the prompts of these roles.

        What is named after the task, or else after the task's type, goes before these: a prompt of the role (`SciFact-query`,
        `Retrieval-query`) or of both, and an adapter.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        column = prompt_type.value if prompt_type else "anchor"
        tower = self.model.config.towers[self.model.config.tower_of(column)]
        names = (task_metadata.name, task_metadata.type)
        name = next((name for name in names if tower.prompt_named(name, column) or name in tower.lora), None)
        vectors = encode(self.model, texts, column=column, task=name, mesh=self.mesh)
        return prefixed(vectors, self.dim, tower) if self.dim else vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, "N M"]:
        """The model's similarity of every vector and every other; a number for two single vectors."""
        both = (np.atleast_2d(part).astype(np.float32) for part in (embeddings1, embeddings2))
        a, b = (comparable(part, self.model.config.similarity) for part in both)
        return (a @ b.T)[0, 0] if np.ndim(embeddings1) == np.ndim(embeddings2) == 1 else a @ b.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[np.ndarray, " N"]:
        """The model's similarity of each vector and the one of the same row."""
        return pairwise(np.atleast_2d(embeddings1), np.atleast_2d(embeddings2), self.model.config.similarity)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """Where mteb keeps results: under the model's name, and a revision that changes with its weights."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction  # pyright: ignore[reportMissingImports]

        towers = [self.model.config.towers[name] for name in self.model.config.encoders]
        size = sum(leaf.size for leaf in jax.tree.leaves(self.model.params["towers"]))
        digests = dict.fromkeys(fingerprint(self.model, role) for role in ("query", "document"))
        return ModelMeta(
            loader=None,
            name=f"embedjax/{Path(self.model.origin).resolve().name}" + (f"-{self.dim}" if self.dim else ""),
            revision="-".join(digest[:12] for digest in digests),
            release_date=None,
            languages=None,
            n_parameters=size,
            memory_usage_mb=size * 4 / 2**20,
            max_tokens=max(getattr(tower, "max_length", 0) or 0 for tower in towers),
            embed_dim=self.dim or towers[0].width,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=ScoringFunction(self.model.config.similarity),
            use_instructions=any(tower.prompts for tower in towers),
            training_datasets=None,
        )

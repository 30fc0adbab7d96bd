"""The model card of an exported folder: what the model is, how to use it, how it was trained and how well it does."""

import json
from collections.abc import Mapping
from typing import Any

from embedjax.config import Config, Set, Static, Tower, serialize
from embedjax.load import Model
from embedjax.models.families.static import LONGEST
from embedjax.models.written import shared_prompts

HEAD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction, embedjax]
---

# {title}

Maps texts to vectors of {width} dimensions, {unit}. Trained with embedjax.

{towers}

## Use

```python
from sentence_transformers import SentenceTransformer

{use}
```
"""

MODEL = """model = SentenceTransformer("path/to/{title}")
"""
USE = {
    "text": MODEL
    + """vectors = model.encode(["a text", "another text"])
print(model.similarity(vectors, vectors))""",
    "query": MODEL
    + """queries = model.encode_query(["what is looked for"])
documents = model.encode_document(["a text", "another text"])
print(model.similarity(queries, documents))""",
    "bare": MODEL
    + """vectors = model.encode(["a text", "another text"], normalize_embeddings=True)
print(model.similarity(vectors, vectors))""",
    "bare query": """query, document = (SentenceTransformer(f"path/to/{title}/{{side}}") for side in ("query", "document"))
queries = query.encode(["what is looked for"], normalize_embeddings=True)
documents = document.encode(["a text", "another text"], normalize_embeddings=True)
print(document.similarity(queries, documents))""",
}


def card(model: Model, title: str, scores: Mapping[str, float] | None = None, format: str = "sentence-transformers") -> str:
    """The card of a folder of a format, as Markdown with the front matter the Hugging Face hub reads."""
    routes = {route: model.config.texts[name] for route, name in model.config.routes.items()}
    parts = [_head(routes, title, format)]
    config = model.details.get("config")
    if isinstance(config, Config):
        parts.append(_training(config, model.details.get("step")))
    if scores:
        rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
        parts.append(f"## Scores\n\n| metric | value |\n|---|---|\n{rows}\n")
    prompts = shared_prompts(routes) if len(routes) > 1 else routes["text"].prompts or {}
    if prompts := {key: value for key, value in prompts.items() if value}:
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in prompts.items())
        parts.append(f"## Prompts\n\n| name | put before the text |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _head(routes: Mapping[str, Tower], title: str, format: str) -> str:
    towers, (first, *_) = routes.values(), routes.values()
    units = {"of length 1" if tower.normalize else "not normalised" for tower in towers}
    columns = ["", *(f"{route} tower" for route in routes)] if len(routes) > 1 else ["", ""]
    facts = {
        "architecture": [_sizes(tower) for tower in towers],
        "longest text": ["any" if tower.max_length == LONGEST else f"{tower.max_length} tokens" for tower in towers],
        "pooling": [str(tower.pooling) for tower in towers],
        "similarity": [tower.similarity or "cosine" for tower in towers],
    }
    rows = [columns, ["---"] * len(columns), *([name, *values] for name, values in facts.items())]
    searches = len(routes) > 1 or "query" in (first.prompts or {})
    use = ("bare query" if searches else "bare") if format == "hf" else "query" if searches else "text"
    return HEAD.format(
        title=title,
        width=first.width,
        unit=units.pop() if len(units) == 1 else "of length 1 or not, by tower",
        towers="\n".join(f"| {' | '.join(row)} |" for row in rows),
        use=USE[use].format(title=title),
    )


def _sizes(tower: Tower) -> str:
    arch = tower.arch
    if isinstance(arch, Static):
        return f"static table of {arch.vocab_size} tokens, width {arch.width}"
    assert arch is not None
    return f"{type(arch).__name__}: {arch.depth} layers, width {arch.width}, {arch.heads} heads"


def _training(config: Config, step: Any) -> str:
    sets = "\n".join(_set(task) for task in config.data.sets)
    starts = {name: tower.init or "random weights" for name, tower in config.model.towers.items()}
    optim = serialize.to_json(config.optim)
    rates = ", ".join(f"{k} {v}" for k, v in optim.items() if k != "type" and v not in ([], "") and (k, v) != ("accumulate", 1))
    return f"""## Training

{sets}

* start: {", ".join(f"{name}: {start}" for name, start in starts.items())}
* steps: {step if step is not None else config.steps} of {config.steps}, batch {config.data.batch_size}, seed {config.seed}
* AdamW: {rates}
"""


def _set(task: Set) -> str:
    loss = {k: v for k, v in serialize.to_json(task.loss).items() if k != "type"}
    source = {k: v for k, v in serialize.to_json(task.source).items() if v not in ("", [])}
    read = f"* data `{task.name}`: `{json.dumps(source)}`, columns `{json.dumps(task.columns)}`"
    return f"{read}\n* loss: {type(task.loss).__name__} {loss}"

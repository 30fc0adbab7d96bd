"""The model card of an exported folder: what the model is, how to use it, how it was trained and how well it does."""

import json
from collections.abc import Mapping
from typing import Any

from embedjax.config import Config, Set, Tower, serialize
from embedjax.load import Model

HEAD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction, embedjax]
---

# {title}

Maps texts to vectors of {width} dimensions, {unit}. Trained with embedjax.

| | |
|---|---|
| architecture | {arch}: {depth} layers, width {hidden}, {heads} heads |
| longest text | {max_length} tokens |
| pooling | {pooling} |
| similarity | {similarity} |

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/{title}")
vectors = model.encode(["a text", "another text"])
print(model.similarity(vectors, vectors))
```
"""


def card(model: Model, title: str, scores: Mapping[str, float] | None = None) -> str:
    """The card as Markdown with the front matter the Hugging Face hub reads."""
    name, tower = next(iter(model.config.towers.items()))
    parts = [_head(model, title, name, tower)]
    config = model.details.get("config")
    if isinstance(config, Config):
        parts.append(_training(config, model.details.get("step")))
    if scores:
        rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
        parts.append(f"## Scores\n\n| metric | value |\n|---|---|\n{rows}\n")
    if tower.prompts:
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in tower.prompts.items())
        parts.append(f"## Prompts\n\n| name | put before the text |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _head(model: Model, title: str, name: str, tower: Tower) -> str:
    arch = tower.arch
    assert arch is not None
    return HEAD.format(
        title=title,
        width=model.embedders[name].width,
        unit="of length 1" if tower.normalize else "not normalised",
        arch=type(arch).__name__,
        depth=arch.depth,
        hidden=arch.width,
        heads=arch.heads,
        max_length=tower.max_length,
        pooling=tower.pooling,
        similarity="cosine",
    )


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

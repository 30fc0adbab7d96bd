"""The model card of an exported folder: what the model is, how to use it, how it was trained and how well it does."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from embedjax.config import Config, ImageTower, ModifiedResnet, Resnet, Set, Static, Tower, Vit, serialize
from embedjax.export.citations import citations
from embedjax.export.usage import CLASSIFIES, LIBRARIES, TASKS, usage
from embedjax.load import Model
from embedjax.models.classifier import Head
from embedjax.models.families.static import LONGEST
from embedjax.models.written import shared_prompts

HEAD = """---
library_name: {library}
pipeline_tag: {task}
tags: [{tags}]
---

# {title}

{does} Trained with embedjax.

{towers}

## Use

```python
{use}
```
"""


def card(model: Model, title: str, scores: Mapping[str, float] | None = None, format: str = "sentence-transformers") -> str:
    """The card of a folder of a format, as Markdown with the front matter the Hugging Face hub reads."""
    routes = {route: model.config.towers[name] for route, name in model.config.routes.items()}
    head = next(iter(model.heads.values())) if format == "classifier" else None
    parts = [_head(routes, title, format, _numbers(model), head)]
    config = model.details.get("config")
    if isinstance(config, Config):
        parts.append(_training(config, model.details.get("step")))
        parts.append("## Citations\n\n" + "\n".join(f"* {paper}" for paper in citations(config)) + "\n")
    late = any(_late(tower) for tower in routes.values())
    trained = config if isinstance(config, Config) else None
    parts.append(_class_commands(title, trained) if head else _commands(title, trained, _prefixes(routes, late=late)))
    if scores:
        rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
        parts.append(f"## Scores\n\n| metric | value |\n|---|---|\n{rows}\n")
    texts = {route: tower for route, tower in routes.items() if isinstance(tower, Tower)}
    prompts = shared_prompts(texts) if len(texts) > 1 else next((tower.prompts or {} for tower in texts.values()), {})
    if prompts := {key: value for key, value in prompts.items() if value}:
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in prompts.items())
        parts.append(f"## Prompts\n\n| name | put before the text |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _numbers(model: Model) -> list[int]:
    """Parameters of each route's tower; [] of a model without."""
    towers = model.params.get("towers", {})
    found = [towers[name] for name in model.config.routes.values() if name in towers]
    return [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) for params in found]


def _head(routes: Mapping[str, Tower | ImageTower], title: str, format: str, sizes: Sequence[int], head: Head | None) -> str:
    towers, (first, *_) = routes.values(), routes.values()
    units = {"of length 1" if tower.normalize else "not normalised" for tower in towers}
    names = {route: _seen(tower) if len({*map(type, towers)}) > 1 else route for route, tower in routes.items()}
    columns = ["", *(f"{name} tower" for name in names.values())] if len(routes) > 1 else ["", ""]
    facts: dict[str, list[str]] = {
        "architecture": [_sizes(tower) for tower in towers],
        "parameters": [f"{n / 1e6:,.1f} million, {n * 4 / 2**20:,.0f} MB" for n in sizes],
        "longest text": [_longest(tower) for tower in towers],
        "pictures": [_pixels(tower) for tower in towers],
        "pooling": [_pooling(tower) for tower in towers],
        "similarity": ["MaxSim" if _late(tower) else tower.similarity or "cosine" for tower in towers],
    }
    rows = [columns, ["---"] * len(columns), *([name, *values] for name, values in facts.items() if any(values))]
    searches = len(routes) > 1 or "query" in (first.prompts or {})
    seen = {_seen(tower) for tower in towers}
    kind = " and ".join(sorted(seen, reverse=True))
    library = LIBRARIES[format if "picture" in seen or format in ("pylate", "classifier") else "sentence-transformers"]
    what = " and ".join(f"{name}s" for name in sorted(seen, reverse=True))
    unit = units.pop() if len(units) == 1 else "of length 1 or not, by tower"
    task, further = (CLASSIFIES, []) if head else (TASKS[kind], ["feature-extraction"])
    return HEAD.format(
        library=library,
        task=task,
        tags=", ".join(dict.fromkeys([library, task, *further, "embedjax"])),
        title=title,
        does=_classes(head) if head else f"Maps {what} to vectors of {first.width} dimensions, {unit}.",
        towers="\n".join(f"| {' | '.join(row)} |" for row in rows),
        use=usage(kind, format, searches=searches, late=_late(first), title=title),
    )


def _prefixes(routes: Mapping[str, Tower | ImageTower], *, late: bool) -> list[int]:
    """Dimensions that the vectors may be cut to; [] by late interaction."""
    width = next(iter(routes.values())).width or 0
    usual = [dim for dim in (256, 128, 64) if dim < width]
    return [] if late else usual or [max(1, width // 2)]


def _commands(title: str, config: Config | None, dims: Sequence[int]) -> str:
    """What to type: the same training again, the vectors of a file, shorter and as codes, and the check of this folder."""
    lines = [f"embedjax train {config.name}.py"] if config else []
    lines += [f"embedjax encode {title} texts.txt vectors.npy"]
    if dims:
        lines += [f"embedjax export {title} --calibrate others.txt --dims {','.join(map(str, dims))}"]
        lines += [f"embedjax encode {title} texts.txt codes.npy --precision int8 --dim {dims[0]}"]
    lines += [f'embedjax search {title} --corpus texts.txt "what is looked for"', f"embedjax export {title} --check"]
    return "## Commands\n\n```\n" + "\n".join(lines) + "\n```\n"


def _class_commands(title: str, config: Config | None) -> str:
    """What to type of a classifier: the same training again, its accuracy, and the check of this folder."""
    lines = [f"embedjax train {config.name}.py"] if config else []
    lines += [f"embedjax evaluate {title} --task head --data labelled.tsv", f"embedjax export {title} --check"]
    return "## Commands\n\n```\n" + "\n".join(lines) + "\n```\n"


def _classes(head: Head, most: int = 20) -> str:
    """What a classifier tells."""
    more = f" and {len(head.labels) - most} more" if len(head.labels) > most else ""
    told = ", ".join(head.labels[:most]) + more
    kind = "which one of {} classes a text is of" if head.criterion == "softmax" else "which of {} labels a text has"
    return f"Tells {kind.format(len(head.labels))}: {told}."


def _seen(tower: Tower | ImageTower) -> str:
    return "picture" if isinstance(tower, ImageTower) else "text"


def _longest(tower: Tower | ImageTower) -> str:
    if isinstance(tower, ImageTower):
        return ""
    return "any" if tower.max_length == LONGEST else f"{tower.max_length} tokens"


def _pixels(tower: Tower | ImageTower) -> str:
    if not isinstance(tower, ImageTower) or tower.pixels is None or tower.arch is None:
        return ""
    fit = "the middle cut out" if tower.pixels.fit == "crop" else "both sides scaled"
    return f"{tower.arch.image} x {tower.arch.image} pixels, {fit}, {tower.pixels.interpolation}"


def _pooling(tower: Tower | ImageTower) -> str:
    if isinstance(tower, ImageTower):
        return tower.arch.pool if isinstance(tower.arch, Vit) else "map" if isinstance(tower.arch, ModifiedResnet) else "mean"
    return "none: a vector a token" if _late(tower) else str(tower.pooling)


def _late(tower: Tower | ImageTower) -> bool:
    return isinstance(tower, Tower) and tower.late is not None


def _sizes(tower: Tower | ImageTower) -> str:
    arch = tower.arch
    if isinstance(arch, Static):
        return f"static table of {arch.vocab_size} tokens, width {arch.width}"
    assert arch is not None
    if isinstance(arch, Resnet | ModifiedResnet):
        return f"{type(arch).__name__}: {arch.depth} blocks, width {arch.width}"
    patches = f", patches of {arch.patch} pixels" if isinstance(arch, Vit) else ""
    return f"{type(arch).__name__}: {arch.depth} layers, width {arch.width}, {arch.heads} heads{patches}"


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

"""Class heads as transformers' ...ForSequenceClassification computes them: the first token's vector, a projection as wide, an
activation and a linear layer. Which towers are just that, and the folders of such that `written_classifier.py` wrote, read.

A folder of this kind from elsewhere is read as any Hugging Face folder, its encoder alone and pooled by the mean: many are what
embeddings are fine-tuned from. Ours say so in config.json, under MARK, which transformers keeps when it saves the model again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from embedjax.config import Architecture, Bert, Dense, DistilBert, Mpnet, Roberta, Tower
from embedjax.config.errors import ConfigError
from embedjax.models.classifier import Head
from embedjax.models.families import family_of
from embedjax.models.jsonfile import get, read_json
from embedjax.models.weights import load_tensors, misfit, refuse

SUFFIX = "ForSequenceClassification"
MARK = "embedjax"
"""Key of config.json: {"head": the set that trained it, "similarity": how the vectors under it are compared}."""
Criterion = Literal["softmax", "sigmoid"]
PROBLEMS: dict[Criterion, str] = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
}
"""What transformers calls a head's criterion."""


class Form(NamedTuple):
    """A family's head."""

    inner: str
    """Name of the projection's tensors, without ".weight" and ".bias"."""
    outer: str
    """Name of the linear layer's."""
    activation: Literal["tanh", "relu"]
    """Between the two."""


ROBERTA = Form("classifier.dense", "classifier.out_proj", "tanh")
FORMS: dict[type, Form] = {
    Bert: Form("bert.pooler.dense", "classifier", "tanh"),
    Roberta: ROBERTA,
    Mpnet: ROBERTA,
    DistilBert: Form("pre_classifier", "classifier", "relu"),
}
"""By architecture. ModernBERT normalises the projected vector by its own mean and variance, which no tower here does."""


def check_tower(name: str, tower: Tower) -> None:
    """Raises ConfigError for a resolved tower that transformers' class does not compute."""
    if type(tower.arch) not in FORMS:
        known = ", ".join(kind.__name__ for kind in FORMS)
        raise ConfigError(
            f"tower {name!r} is a {type(tower.arch).__name__}, whose {SUFFIX} in transformers, if any, is of another form; the "
            f"classifier format is of {known}"
        )
    assert tower.arch is not None
    wanted = {"pooling": "cls", "dense": dense_of(tower.arch), "normalize": False}
    found = {key: getattr(tower, key) for key in wanted}
    if found != wanted:
        listed = lambda values: ", ".join(f"{key}={value!r}" for key, value in values.items())
        raise ConfigError(
            f"the classifier format ({architecture_of(tower.arch)}) needs a tower with {listed(wanted)}; tower {name!r} has "
            f"{listed(found)}. Other towers have their heads beside them in a folder of sentence-transformers"
        )
    if prompts := sorted(key for key, text in (tower.prompts or {}).items() if text):
        raise ConfigError(
            f"tower {name!r} has the prompts {prompts}; transformers puts none before a text: set the tower's prompts to {{}}"
        )


def dense_of(arch: Architecture) -> tuple[Dense, ...]:
    """The projections that a tower of an architecture has in this form."""
    return (Dense(arch.width, True, FORMS[type(arch)].activation),)


def architecture_of(arch: Architecture) -> str:
    """The name of transformers' class."""
    return family_of(arch).to_hf(arch)["architectures"][0].removesuffix("Model") + SUFFIX


def described(tower: Tower, name: str, head: Head) -> dict[str, Any]:
    """What config.json says of a head, by its name, over what it says of the encoder."""
    assert tower.arch is not None
    return {
        "architectures": [architecture_of(tower.arch)],
        "num_labels": len(head.labels),
        "id2label": {str(n): label for n, label in enumerate(head.labels)},
        "label2id": {label: n for n, label in enumerate(head.labels)},
        "problem_type": PROBLEMS[head.criterion],
        MARK: {"head": name, "similarity": tower.similarity},
    }


def to_tensors(arch: Architecture, params: Mapping[str, Any], head: Head) -> dict[str, np.ndarray]:
    """The tensors of the projection, from a tower's parameters, and of the head. Raises ConfigError for other sizes."""
    form, own = FORMS[type(arch)], params["dense"]["0"]
    layers = {form.inner: (own["kernel"], own["bias"]), form.outer: (head.kernel, head.bias)}
    tensors: dict[str, np.ndarray] = {}
    for layer, (kernel, bias) in layers.items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = np.asarray(kernel, np.float32).T, np.asarray(bias, np.float32)
    _refuse(arch, form, len(head.labels), tensors, "the parameters")
    return tensors


def head_name(folder: Path) -> str | None:
    """The name of the head in a folder of ours of this kind; None for other folders."""
    file = folder / "config.json"
    if not file.exists() or (folder / "modules.json").exists():
        return None
    config = read_json(file)
    if not any(str(name).endswith(SUFFIX) for name in get(config, "architectures", list, [], file=file)):
        return None
    return get(get(config, MARK, dict, {}, file=file), "head", str, None, file=file)


def read_settings(folder: Path, arch: Architecture) -> dict[str, Any]:
    """How a tower of such a folder differs from that of a plain one. Raises ConfigError for an architecture without a form."""
    file = folder / "config.json"
    if type(arch) not in FORMS:
        raise ConfigError(f"{file}: a {type(arch).__name__} with {MARK!r} and a class head is not supported")
    similarity = get(get(read_json(file), MARK, dict, {}, file=file), "similarity", str, "cosine", file=file)
    if similarity not in ("cosine", "dot"):
        raise ConfigError(f"{file}: similarity {similarity!r} is not supported; expected cosine or dot")
    return {"pooling": "cls", "dense": dense_of(arch), "normalize": False, "similarity": similarity}


def read_dense(folder: Path, arch: Architecture) -> dict[str, Any]:
    """{"dense": {"0": {"kernel", "bias"}}} of such a folder."""
    tensors, form, _ = _read(folder, arch)
    kernel = np.ascontiguousarray(tensors[f"{form.inner}.weight"].T)
    return {"dense": {"0": {"kernel": kernel, "bias": tensors[f"{form.inner}.bias"]}}}


def read_head(folder: Path, arch: Architecture) -> Head:
    """The head of such a folder. Raises ConfigError for labels or a problem that is none of ours."""
    file = folder / "config.json"
    tensors, form, labels = _read(folder, arch)
    problem = get(read_json(file), "problem_type", str, "", file=file)
    criterion: Criterion | None = next((ours for ours, theirs in PROBLEMS.items() if theirs == problem), None)
    if criterion is None:
        raise ConfigError(f"{file}: problem_type {problem!r} is not supported; expected {' or '.join(PROBLEMS.values())}")
    kernel = np.ascontiguousarray(tensors[f"{form.outer}.weight"].T)
    return Head(labels, False, criterion, kernel, tensors[f"{form.outer}.bias"])


def _read(folder: Path, arch: Architecture) -> tuple[dict[str, np.ndarray], Form, tuple[str, ...]]:
    file, form = folder / "config.json", FORMS[type(arch)]
    named = get(read_json(file), "id2label", dict, {}, file=file)
    numbers = [str(n) for n in range(len(named))]
    if not named or set(named) != set(numbers):
        raise ConfigError(f"{file}: id2label has the keys {sorted(named)}; expected 0, 1, ... of every class")
    names = {f"{layer}.{part}" for layer in (form.inner, form.outer) for part in ("weight", "bias")}
    tensors = load_tensors(folder, only=names)
    _refuse(arch, form, len(named), tensors, folder)
    return tensors, form, tuple(str(named[number]) for number in numbers)


def _refuse(arch: Architecture, form: Form, classes: int, tensors: Mapping[str, np.ndarray], file: str | Path) -> None:
    """Raises ConfigError for tensors of a head that are missing or of another shape."""
    shapes = {f"{form.inner}.weight": (arch.width, arch.width), f"{form.inner}.bias": (arch.width,)}
    shapes |= {f"{form.outer}.weight": (classes, arch.width), f"{form.outer}.bias": (classes,)}
    missing = [name for name in shapes if name not in tensors]
    found = [misfit(name, tensors[name], shape) for name, shape in shapes.items() if name in tensors]
    refuse({"missing": missing, "misshapen": [told for told in found if told]}, architecture_of(arch), file=file)

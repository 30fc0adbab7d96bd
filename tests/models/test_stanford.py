"""Stanford's ColBERT checkpoints: read, and what is refused."""

import json

import colbert
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate.late import encode_tokens
from embedjax.load import load
from embedjax.models.folders import read_params, read_tower


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colbert.model(tmp_path_factory.mktemp("colbert"))


@pytest.fixture
def folder(model, tmp_path):
    return colbert.stanford(tmp_path / "checkpoint", model)


def change(folder, **values):
    file = folder / "artifact.metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_checkpoint_is_read_whole(model, folder):
    tower = read_tower(folder)
    assert tower.late == colbert.LATE and tower.dense == colbert.DENSE and tower.max_length == 24
    found = load(folder)
    assert found.params["towers"]["text"]["dense"]["0"]["kernel"].shape == (24, 8)
    for side in ("query", "document"):
        texts = colbert.texts(5, 20)
        one, other = (encode_tokens(each, texts, column=side) for each in (model, found))
        np.testing.assert_array_equal(one.starts, other.starts)
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)
    known = found.texts["text"].tokenizer.token_to_id
    ids = found.texts["text"].of("query").encode(["fox"])["ids"]
    assert ids[0, 1] == known("[unused0]") and ids[0, -1] == known("[MASK]")


def test_what_the_metadata_does_not_say_is_colberts_default(folder):
    (folder / "artifact.metadata").write_text('{"dim": 8, "doc_maxlen": 30, "mask_punctuation": false}')
    assert read_tower(folder).late == c.Late(query_length=32, document_length=30, skip=())


@pytest.mark.parametrize(
    "values, told",
    [
        ({"similarity": "l2"}, "similarity 'l2' is not supported"),
        ({"interaction": "flipr"}, "interaction 'flipr' is not supported"),
        ({"query_maxlen": "32"}, "query_maxlen"),
        ({"query_maxlen": 2}, "artifact.metadata: Late.query_length is 2; a text of one token"),
        ({"doc_maxlen": 220}, "of up to 220 tokens; the encoder has positions for 40"),
        ({"dim": 0}, "dim is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_metadata_that_are_not_supported_are_told(folder, values, told):
    change(folder, **values)
    with pytest.raises(ConfigError, match=told):
        read_tower(folder)


def test_tensors_that_do_not_fit_are_told_in_one_error(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["other.weight"] = np.zeros(3, np.float32)
    del tensors["bert.embeddings.LayerNorm.bias"]
    save_file(tensors, folder / "model.safetensors")
    change(folder, dim=128)
    tower = read_tower(folder)
    misshapen = r"misshapen: linear.weight is \[8, 24\], expected \[128, 24\]"
    with pytest.raises(ConfigError, match=f"unknown: other.weight; missing: embeddings.LayerNorm.bias; {misshapen}"):
        read_params(folder, tower)
    del tensors["linear.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="unknown: other.weight; missing: embeddings.LayerNorm.bias, linear.weight"):
        read_params(folder, tower)


def test_pickled_weights_are_not_read_and_how_to_convert_them_is_told(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights .*safetensors.torch") as told:
        load(folder)
    assert len(str(told.value).splitlines()) == 1


def test_a_checkpoint_without_its_metadata_is_told(folder):
    (folder / "artifact.metadata").unlink()
    with pytest.raises(ConfigError, match="without artifact.metadata"):
        load(folder)

"""Folders of towers of pictures: what is written comes back whole, in every format, and damaged ones are one clear error."""

import dataclasses
import json
import re

import gallery
import jax
import numpy as np
import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.load import load, resolve_tower
from embedjax.models import folders, open_clip, pictures
from embedjax.models.pictures import PREPROCESSOR, find, read_image_tower, read_params
from embedjax.models.written_pictures import Towers, check, write_hf, write_open_clip, write_sentence_transformers

LOSS = {"scale": 2.0}


def towers_of(made, **changes):
    """A model's towers as the writers take them."""
    text = made.config.texts.get("text")
    write_tokenizer = lambda folder: gallery.tokenizer(folder)
    parts = {
        "image": (made.config.towers["image"], made.params["towers"]["image"]) if "image" in made.config.towers else None,
        "text": (text, made.params["towers"]["text"], write_tokenizer) if text else None,
    }
    return Towers(**parts | {"loss": LOSS} | changes)


@pytest.fixture
def clip(tmp_path):
    return gallery.model(tmp_path / "tokenizer", *gallery.PAIRS["clip"])


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def without(tower):
    """A tower but for where it lies, and what no folder says."""
    std = {"init_std": 0.02} if hasattr(tower.arch, "init_std") else {}
    arch = dataclasses.replace(tower.arch, **std, **({"positions": "learned"} if isinstance(tower.arch, c.Vit) else {}))
    gone = {"arch": arch, "init": ""}
    return dataclasses.replace(tower, **gone, **({"tokenizer": ""} if isinstance(tower, c.Tower) else {}))


HOLDS = [
    ("clip", write_hf),
    ("siglip", write_hf),
    *((name, write_sentence_transformers) for name in gallery.PAIRS),
]


@pytest.mark.parametrize(("name", "write"), HOLDS)
def test_what_is_written_is_read_whole(name, write, tmp_path):
    made = gallery.model(tmp_path / "tokenizer", *gallery.PAIRS[name])
    read = load(write(tmp_path / "out", towers_of(made)))
    assert {side: without(tower) for side, tower in read.config.towers.items()} == {
        side: without(tower) for side, tower in made.config.towers.items()
    }
    found = jax.tree.map(lambda x: x, dict(read.params["towers"]))
    if name == "bert and mean":  # fixed positions are written as a table
        assert found["image"]["encoder"].pop("positions")["embedding"].shape == (25, 24)
    same(found, made.params["towers"])
    joined = "bert" not in name
    assert read.details.get("loss", {}).get("scale") == (np.float32(2) if joined else None)
    # A tower of a config may start from either side of the folder.
    image, text = resolve_tower(c.ImageTower(init=str(tmp_path / "out"))), resolve_tower(c.Tower(init=str(tmp_path / "out")))
    assert without(image) == without(read.config.towers["image"]) and without(text) == without(read.config.towers["text"])
    same(read_params(tmp_path / "out", "image", image.arch), read.params["towers"]["image"])
    same(folders.read_params(tmp_path / "out", text), read.params["towers"]["text"])


def test_open_clip_pads_to_all_positions(clip, tmp_path):
    """A text is cut where the tower cuts it: positions beyond are not written."""
    read = load(write_open_clip(tmp_path / "out", towers_of(clip)))
    text = read.config.texts["text"]
    assert text.max_length == text.arch.positions == 9 and read.texts["text"].max_length == 9
    expected = dict(clip.params["towers"])
    encoder = expected["text"]["encoder"]
    expected["text"] = {
        **expected["text"],
        "encoder": {**encoder, "positions": {"embedding": encoder["positions"]["embedding"][:9]}},
    }
    same(read.params["towers"], expected)
    assert without(read.config.towers["image"]) == without(clip.config.towers["image"])
    assert json.loads((tmp_path / "out" / open_clip.CONFIG).read_text())["model_cfg"]["text_cfg"]["context_length"] == 9


ALONE = {
    "vit": (gallery.VIT, ()),
    "vit with a projection": (gallery.VIT, gallery.PLAIN),
    "clip": (gallery.CLIP_VIT, gallery.PLAIN),
    "map": (gallery.SIGLIP_VIT, ()),
    "resnet": (gallery.RESNET, ()),
    "mean": (dataclasses.replace(gallery.VIT, pool="mean"), (c.Dense(5, True, "tanh"), c.Dense(4, True, "identity"))),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_image_tower_alone(name, tmp_path):
    arch, dense = ALONE[name]
    made = gallery.model(tmp_path, gallery.image(arch, dense=dense, similarity="dot", normalize=False))
    read = load(write_sentence_transformers(tmp_path / "out", towers_of(made)))
    assert without(read.config.towers["image"]) == without(made.config.towers["image"])
    same(read.params["towers"], made.params["towers"])
    assert read.config.routes == {"text": "image"} and not read.texts
    if name in ("vit", "clip", "map", "resnet"):
        read = load(write_hf(tmp_path / "hf", towers_of(made)))
        same(read.params["towers"], made.params["towers"])
    with pytest.raises(ConfigError, match="holds no tower of texts"):
        folders.read_tower(tmp_path / "out")


def test_texts_of_clip_and_siglip_alone_are_pooled_as_they_are_there(clip, tmp_path):
    """By the last token, not by the mean as other plain folders, and with their projection."""
    read = load(write_hf(tmp_path / "clip", towers_of(clip, image=None)))
    assert without(read.config.texts["text"]) == without(clip.config.texts["text"])
    same(read.params["towers"]["text"], clip.params["towers"]["text"])
    bare = dataclasses.replace(clip.config.texts["text"], dense=())
    part = (bare, {"encoder": clip.params["towers"]["text"]["encoder"]}, towers_of(clip).text[2])
    read = folders.read_tower(write_hf(tmp_path / "bare", Towers(text=part)))
    assert (read.pooling, read.dense, read.max_length) == ("lasttoken", (), 9)
    made = gallery.model(tmp_path / "tokenizer", text=gallery.SIGLIP_TEXT)
    read = load(write_hf(tmp_path / "siglip", towers_of(made)))
    assert without(read.config.texts["text"]) == without(gallery.SIGLIP_TEXT)
    config = json.loads((tmp_path / "siglip" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 9


def test_old_and_new_spellings_of_a_clip_model(clip, tmp_path):
    """As sentence-transformers 2 to 5 write it, without Normalize, and as 5.4 and later write any joint model."""
    folder = write_sentence_transformers(tmp_path / "out", towers_of(clip))
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["0_CLIPModel", "1_Normalize"]
    assert modules[0]["type"] == "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps(modules[:1]))
    assert not any(tower.normalize for tower in load(folder).config.towers.values())
    modules[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    read = load(folder)
    same(read.params["towers"], clip.params["towers"])
    (folder / "0_CLIPModel" / PREPROCESSOR).rename(folder / "0_CLIPModel" / "old.json")
    processor = {"image_processor": json.loads((folder / "0_CLIPModel" / "old.json").read_text())}
    (folder / "0_CLIPModel" / "processor_config.json").write_text(json.dumps(processor))
    assert read_image_tower(folder).pixels == gallery.PIXELS, "transformers 5 keeps it in another file"
    modules.insert(1, {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Dense").mkdir()
    with pytest.raises(ConfigError, match="nothing but Normalize is read behind it"):
        load(folder)


def test_a_folder_of_both_formats_is_hugging_faces(clip, tmp_path):
    """As the hub has many: open_clip's files beside those of a CLIPModel."""
    write_hf(tmp_path / "out", towers_of(clip))
    (tmp_path / "out" / open_clip.CONFIG).write_text("{}")
    assert find(tmp_path / "out").file.name == "config.json"


@pytest.mark.parametrize("write", [write_hf, write_open_clip, write_sentence_transformers])
@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape", "cut", "gone", "twice"])
def test_damaged_weights_are_one_clear_error(write, spoil, clip, tmp_path):
    import safetensors.numpy

    folder = write(tmp_path / "out", towers_of(clip))
    (file,) = [file for file in folder.rglob("*.safetensors")]
    tensors = safetensors.numpy.load_file(file)
    name = next(
        name for name in tensors if name.endswith("layers.0.mlp.fc1.bias") or name.endswith("resblocks.0.mlp.c_fc.bias")
    )
    told = {"missing": f"missing: {name}", "unknown": "unknown: more", "shape": f"misshapen: {name} is [3], expected [40]"}
    told |= {"cut": "truncated or corrupt", "gone": "holds no weights", "twice": "doubly set: "}
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif spoil == "gone":
        file.unlink()
    else:
        norm = next(name for name in tensors if re.search(r"final_layer_norm.weight|ln_final.weight", name))
        changes = {"missing": {}, "unknown": {"more": np.ones(2)}, "shape": {name: np.ones(3, np.float32)}}
        changes["twice"] = {norm.replace("weight", "gamma"): tensors[norm]}
        kept = {key: x for key, x in tensors.items() if spoil != "missing" or key != name}
        safetensors.numpy.save_file(kept | changes[spoil], file)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert told[spoil] in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def edited(folder, file, **changes):
    path = folder / file
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("image/config.json", {"model_type": "clap"}, "holds no tower of images|not supported"),
        ("image/config.json", {"auto_map": {"AutoModel": "mine.py"}}, "code of its own"),
        ("image/sentence_bert_config.json", {"modality_config": {"image": {"method_output_name": "logits"}}}, "'logits'"),
        ("image/1_Pooling/config.json", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "pooling is mean"),
        ("image/1_Pooling/config.json", {"word_embedding_dimension": 7}, "vectors of width 7"),
        ("image/preprocessor_config.json", {"do_normalize": False}, "do_normalize is false"),
        ("image/2_Dense/config.json", {"in_features": 7}, "in_features is 7"),
        ("text/modules.json", None, "holds a JSON dict"),
        (
            "router_config.json",
            {"structure": {"text": [], "audio": []}},
            "expected .*'document', 'query'.* or .*'image', 'text'",
        ),
        ("router_config.json", {"parameters": {"route_mappings": {"(None, 'text')": "image"}}}, "route_mappings"),
    ],
)
def test_what_cannot_be_read_faithfully_is_refused(file, changes, told, tmp_path):
    made = gallery.model(tmp_path / "tokenizer", *gallery.PAIRS["bert"])
    folder = write_sentence_transformers(tmp_path / "out", towers_of(made))
    if changes is None:
        (folder / file).write_text("{}")
    else:
        edited(folder, file, **changes)
    with pytest.raises(ConfigError, match=told) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_router_is_told_its_side(tmp_path):
    made = gallery.model(tmp_path / "tokenizer", *gallery.PAIRS["bert"])
    folder = write_sentence_transformers(tmp_path / "out", towers_of(made))
    with pytest.raises(ConfigError, match="a tower of texts and one of pictures; name one: .*text"):
        find(folder)
    assert read_image_tower(folder / "image").dense == made.config.towers["image"].dense
    with pytest.raises(ConfigError, match="holds no tower of images"):
        pictures.required(folder / "text", "image")


SHORTER = gallery.image(gallery.CLIP_VIT, pixels=c.Pixels(shorter=24), dense=gallery.PLAIN)
ODD = gallery.image(dataclasses.replace(gallery.VIT, input_norm=True))
MIXED = (gallery.PAIRS["clip"][0], gallery.text(c.ClipText(**gallery.TEXT, activation="gelu"), dense=gallery.PLAIN))


@pytest.mark.parametrize(
    ("format", "towers", "told"),
    [
        ("hf", gallery.PAIRS["bert"], "a Bert pooled by 'mean'; .* sentence-transformers any"),
        ("open-clip", gallery.PAIRS["bert"], "a Bert pooled by 'mean'"),
        ("open-clip", (gallery.image(gallery.CLIP_VIT), None), "a tower of texts beside"),
        ("open-clip", MIXED, "both towers or in none; these have quick_gelu and gelu"),
        ("open-clip", (SHORTER, gallery.CLIP_TEXT), "Pixels.shorter is 24"),
        ("hf", (gallery.image(dataclasses.replace(gallery.CLIP_VIT, registers=2)), None), "2 registers"),
        ("sentence-transformers", (ODD, gallery.BERT), "input_norm True"),
        ("hf", (gallery.image(gallery.VIT, dense=gallery.PLAIN), gallery.CLIP_TEXT), "a vit has the projections"),
        ("hf", (gallery.image(gallery.VIT), gallery.CLIP_TEXT), "joins a ClipText with this image tower"),
    ],
)
def test_a_format_that_has_no_such_model_says_so(format, towers, told):
    with pytest.raises(ConfigError, match=told):
        check(format, *towers)

"""Models of two towers and their halves: the way there and back for every form, and what is refused, in one error."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from embedjax.config import ClipText, Dense, SiglipText, Vit
from embedjax.config.errors import ConfigError
from embedjax.models import weights
from embedjax.models.clip import Part, from_tensors, parts, to_hf, to_tensors
from embedjax.models.embedder import Embedder
from embedjax.models.image import ImageEmbedder

TEXT = {"vocab_size": 11, "width": 8, "depth": 2, "heads": 2, "mlp": 12, "positions": 9}
IMAGE = Vit(image=6, patch=2, width=8, depth=3, heads=2, mlp=12)
CLIP_IMAGE = dataclasses.replace(IMAGE, input_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)
SIGLIP_IMAGE = dataclasses.replace(IMAGE, pool="map", activation="gelu_tanh")
CLIP_TEXT, SIGLIP_TEXT = ClipText(**TEXT, pad_id=10, eos_id=10), SiglipText(**TEXT)
PLAIN, BIASED = (Dense(5, False, "identity"),), (Dense(8, True, "identity"),)
CLIP = {"image": Part(CLIP_IMAGE, PLAIN), "text": Part(CLIP_TEXT, PLAIN)}
SIGLIP = {"image": Part(SIGLIP_IMAGE), "text": Part(SIGLIP_TEXT, BIASED)}
MODELS = {
    "CLIPModel": CLIP,
    "SiglipModel": SIGLIP,
    "ViTModel": {"image": Part(IMAGE)},
    "CLIPVisionModel": {"image": Part(CLIP_IMAGE)},
    "CLIPVisionModelWithProjection": {"image": CLIP["image"]},
    "CLIPTextModel": {"text": Part(CLIP_TEXT)},
    "CLIPTextModelWithProjection": {"text": CLIP["text"]},
    "SiglipVisionModel": {"image": SIGLIP["image"]},
    "SiglipTextModel": {"text": SIGLIP["text"]},
    "SiglipVisionModel without head": {"image": Part(dataclasses.replace(SIGLIP_IMAGE, pool="mean"))},
}


def embedder_of(part):
    kind = ImageEmbedder if isinstance(part.arch, Vit) else functools.partial(Embedder, pooling="lasttoken")
    return kind(part.arch, dense=part.dense)


def random_params(found):
    rng = np.random.default_rng(0)
    shapes = {side: jax.eval_shape(embedder_of(part).init, jax.random.key(0)) for side, part in found.items()}
    loss = {"loss": {"scale": 0, "bias": 0} if found == SIGLIP else {"scale": 0}} if len(found) == 2 else {}
    draw = lambda leaf: rng.normal(size=np.shape(leaf)).astype(np.float32)
    return jax.tree.map(draw, {"towers": shapes} | loss)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    found = MODELS[name]
    params = random_params(found)
    tensors = to_tensors(found, params)
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in tensors.values())
    back = from_tensors(found, tensors, file="x")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert jax.tree.all(jax.tree.map(lambda x, y: np.shape(x) == np.shape(y), back, params))
    config = to_hf(found)
    assert config["architectures"] == [name.split()[0]]
    assert parts(json.loads(json.dumps(config)), file="x") == found


def test_orientation():
    """A convolution's [out, channel, row, column] is our [row, column, channel, out]; fused projections are q, k, v."""
    tensors = to_tensors(SIGLIP, random_params(SIGLIP))
    image = from_tensors(SIGLIP, tensors, file="x")["towers"]["image"]["encoder"]
    conv, kernel = tensors["vision_model.embeddings.patch_embedding.weight"], image["patches"]["kernel"]
    assert conv.shape == (8, 3, 2, 2) and kernel.shape == (12, 8)
    for row in range(2):
        for column in range(2):
            np.testing.assert_array_equal(kernel[6 * row + 3 * column : 6 * row + 3 * column + 3], conv[:, :, row, column].T)
    for n, part in enumerate(("query", "key", "value")):
        attn, rows = image["head"]["attn"][part], slice(8 * n, 8 * n + 8)
        np.testing.assert_array_equal(attn["kernel"], tensors["vision_model.head.attention.in_proj_weight"][rows].T)
        np.testing.assert_array_equal(attn["bias"], tensors["vision_model.head.attention.in_proj_bias"][rows])
    tensors = to_tensors(CLIP, random_params(CLIP))
    dense = from_tensors(CLIP, tensors, file="x")["towers"]["text"]["dense"]["0"]["kernel"]
    np.testing.assert_array_equal(dense, tensors["text_projection.weight"].T)
    assert tensors["logit_scale"].shape == () and tensors["vision_model.embeddings.class_embedding"].shape == (8,)


def test_a_loss_that_is_not_learned_is_written_as_it_starts():
    params = random_params(SIGLIP)
    tensors = to_tensors(SIGLIP, {"towers": params["towers"]})
    assert tensors["logit_scale"] == pytest.approx([np.log(10)]) and tensors["logit_bias"].tolist() == [-10]
    clip = to_tensors(CLIP, {"towers": random_params(CLIP)["towers"]})
    assert clip["logit_scale"] == pytest.approx(np.log(1 / 0.07)) and "logit_bias" not in clip


def test_prefixes_buffers_and_other_towers_are_known():
    """A half reads from a file of its own, with or without its prefix, and from that of the whole."""
    params = random_params(CLIP)
    whole = to_tensors(CLIP, params)
    for side, theirs in (("image", "vision"), ("text", "text")):
        found = {side: CLIP[side]}
        expected = {"towers": {side: params["towers"][side]}}
        bare = {name.removeprefix(f"{theirs}_model."): x for name, x in to_tensors(found, expected).items()}
        buffer = {f"{theirs}_model.embeddings.position_ids": np.arange(9)[None]}
        for tensors in (whole | buffer, bare):
            jax.tree.map(np.testing.assert_array_equal, from_tensors(found, tensors, file="x"), expected)
    found, params = {"image": Part(IMAGE)}, random_params({"image": Part(IMAGE)})
    classifier = {f"vit.{name}": x for name, x in to_tensors(found, params).items()} | {
        "classifier.bias": np.ones(2, np.float32)
    }
    jax.tree.map(np.testing.assert_array_equal, from_tensors(found, classifier, file="x"), params)
    encoder = weights.from_tensors(IMAGE, classifier, file="x")
    jax.tree.map(np.testing.assert_array_equal, encoder, params["towers"]["image"]["encoder"])


def test_every_surprise_is_told_in_one_error():
    tensors = to_tensors(CLIP, random_params(CLIP))
    tensors["adapter.weight"] = tensors["vision_model.encoder.layers.3.mlp.fc1.bias"] = np.ones(8, np.float32)
    tensors["text_model.final_layer_norm.gamma"] = np.ones(8, np.float32)
    del tensors["logit_scale"], tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    tensors["visual_projection.weight"] = np.ones((4, 8), np.float32)
    tensors["vision_model.embeddings.patch_embedding.weight"] = np.ones((8, 3, 2, 3), np.float32)
    tensors["text_projection.weight"] = np.ones((5, 8), np.int32)
    with pytest.raises(ConfigError) as caught:
        from_tensors(CLIP, tensors, file="here")
    told = str(caught.value)
    assert told.startswith("here does not hold the tensors of Vit and ClipText") and "\n" not in told
    for part in (
        "unknown: adapter.weight, vision_model.encoder.layers.3.mlp.fc1.bias",
        "missing: logit_scale, text_model.encoder.layers.1.mlp.fc2.bias",
        "doubly set: text_model.final_layer_norm.gamma",
        "visual_projection.weight is [4, 8], expected [5, 8]",
        "text_projection.weight holds int32",
        "vision_model.embeddings.patch_embedding.weight is [8, 3, 2, 3], expected [8, 3, 2, 2]",
    ):
        assert part in told, told
    single = {"text": CLIP["text"]}
    tensors = to_tensors(single, random_params(single))
    tensors["final_layer_norm.bias"] = np.ones(8, np.float32)
    with pytest.raises(ConfigError, match="doubly set: final_layer_norm.bias"):
        from_tensors(single, tensors, file="here")
    with pytest.raises(ConfigError, match="fewer than the 2 layers"):
        from_tensors(single, {}, file="here")


@pytest.mark.parametrize("spoil", ["none", "more", "shape", "patches", "encoder"])
def test_parameters_that_are_not_the_towers_are_not_written(spoil):
    params = random_params(CLIP)
    image = params["towers"]["image"]
    if spoil == "none":
        del image["dense"]
    elif spoil == "more":
        image["dense"]["1"] = image["dense"]["0"]
    elif spoil == "shape":
        image["dense"]["0"]["kernel"] = image["dense"]["0"]["kernel"][:, 1:]
    elif spoil == "patches":
        image["encoder"]["patches"]["kernel"] = image["encoder"]["patches"]["kernel"][1:]
    else:
        image["encoder"]["registers"] = {"embedding": np.ones((1, 8), np.float32)}
    with pytest.raises(ConfigError, match="dense/0/kernel|dense/1|patch_embedding.weight is|registers"):
        to_tensors(CLIP, params)


# ---- config.json


def config_of(name, side="", **changes):
    config = json.loads(json.dumps(to_hf(MODELS[name])))
    (config[side] if side else config).update(changes)
    return config


def test_configs_of_other_years():
    assert parts(config_of("CLIPModel", "text_config", eos_token_id=2), file="x") == CLIP  # before mid-2023
    twice = config_of("CLIPModel") | {"text_config_dict": config_of("CLIPModel")["text_config"], "vision_config_dict": None}
    twice["text_config"] = {"hidden_size": 512}
    assert parts(twice, file="x") == CLIP
    found = parts({"model_type": "clip"}, file="x")  # what a config leaves out is OpenAI's ViT-B/32
    assert found["text"] == Part(ClipText(pad_id=1), (Dense(512, False, "identity"),))
    assert (found["image"].arch.patch, found["image"].arch.width, found["image"].arch.activation) == (32, 768, "quick_gelu")
    found = parts({"model_type": "siglip"}, file="x")
    assert found["text"] == Part(SiglipText(), (Dense(768, True, "identity"),)) and found["image"].arch.pool == "map"
    assert parts(config_of("ViTModel", image_size=[6, 6], patch_size=[2, 2]), file="x") == MODELS["ViTModel"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "clap"}, "model_type 'clap' is not supported; did you mean 'clip'"),
        ({}, "model_type None is not supported"),
        (config_of("CLIPModel") | {"text_config": [1]}, "text_config is .* expected an object"),
        (config_of("CLIPModel", "text_config", hidden_size="8"), "does not describe a clip_text_model"),
        (config_of("CLIPModel", "text_config", hidden_size=8.0), "8.0 .width. should be of type int"),
        (config_of("CLIPModel", "text_config", hidden_act="tanh"), "activation 'tanh'"),
        (config_of("CLIPModel", projection_dim=0), "0 features"),
        (config_of("SiglipTextModel", projection_size="a"), "'a' features"),
        (config_of("ViTModel", image_size=[6, 8]), "squares"),
        (config_of("ViTModel", image_size=1), "smaller than patch"),
        (config_of("ViTModel", num_channels=1), "num_channels"),
        (config_of("ViTModel", qkv_bias=False), "qkv_bias"),
        (config_of("SiglipModel", "vision_config", num_hidden_layers=0), "depth is 0"),
    ],
)
def test_configs_that_are_refused(config, told):
    with pytest.raises(ConfigError, match=f"here.*{told}"):
        parts(config, file="here")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"image": SIGLIP["image"], "text": CLIP["text"]}, "joins a ClipText"),
        ({"image": Part(dataclasses.replace(SIGLIP_IMAGE, pool="mean")), "text": SIGLIP["text"]}, "joins a SiglipText"),
        ({"image": Part(CLIP_IMAGE), "text": CLIP["text"]}, "a clip_vision_model has the projections"),
        ({"image": Part(CLIP_IMAGE, (Dense(4, False, "identity"),)), "text": CLIP["text"]}, "vectors of 4 and 5 numbers"),
        ({"image": SIGLIP["image"], "text": Part(SIGLIP_TEXT, (Dense(4, True, "identity"),))}, "vectors of 8 and 4 numbers"),
        ({"text": Part(SIGLIP_TEXT)}, "Hugging Face's has one"),
        ({"image": Part(IMAGE, PLAIN)}, "Hugging Face's has none"),
        ({"text": Part(CLIP_TEXT, (Dense(5),))}, "without activation"),
        ({"image": Part(dataclasses.replace(IMAGE, registers=1))}, "1 registers"),
        ({"image": Part(dataclasses.replace(IMAGE, input_norm=True))}, "input_norm True"),
        ({"image": Part(dataclasses.replace(IMAGE, positions="sincos"))}, "with_table"),
        ({"text": Part(dataclasses.replace(CLIP_TEXT, eos_id=2))}, "eos_id is 2"),
    ],
)
def test_towers_that_no_model_has_are_not_written(found, told):
    with pytest.raises(ConfigError, match=told):
        to_hf(found)

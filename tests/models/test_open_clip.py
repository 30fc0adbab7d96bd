"""open_clip's folders of models: the way there and back for every form, and what is refused, in one error."""

import dataclasses
import json

import numpy as np
import pytest
from gallery import PLAIN, TEXT, params_of
from gallery import image as image_tower
from gallery import text as text_tower

from embedjax.config import ClipText, Dense, ModifiedResnet, Pixels, Resnet, SiglipText, Vit
from embedjax.config.errors import ConfigError
from embedjax.models import open_clip, timm
from embedjax.models.joint import Part
from embedjax.models.open_clip import from_tensors, parts, to_config, to_tensors

IMAGE = Vit(image=12, patch=4, width=16, depth=3, heads=2, mlp=24, input_norm=True, patch_bias=False, norm_eps=1e-5)
TIMM = Vit(image=12, patch=4, width=16, depth=3, heads=2, mlp=24)
WIDE = (Dense(16, True, "identity"),)
CLIP = {"image": Part(IMAGE, PLAIN), "text": Part(ClipText(**TEXT, pad_id=0, eos_id=3, activation="gelu"), PLAIN)}
SIGLIP = {
    "image": Part(dataclasses.replace(TIMM, pool="map")),
    "text": Part(SiglipText(**TEXT, pad_id=0, activation="gelu"), WIDE),
}
RESNET = ModifiedResnet(image=32, depths=(1, 2, 1, 1), channels=4, heads=4, features=10)
change = lambda found, side, **arch: {
    **found, side: found[side]._replace(arch=dataclasses.replace(found[side].arch, **arch))
}  # fmt: skip
QUICK = change(change(CLIP, "image", activation="quick_gelu"), "text", activation="quick_gelu", eos_id=95)
MODELS = {
    "clip": CLIP,
    "quick": QUICK,
    "other sizes": change(change(CLIP, "image", mlp=31, norm_eps=1e-6, heads=4), "text", mlp=41, activation="gelu_tanh"),
    "no norm before": change(CLIP, "image", input_norm=False),
    "siglip": SIGLIP,
    "siglip text": {"image": CLIP["image"], "text": Part(SIGLIP["text"].arch, (Dense(10, True, "identity"),))},
    "mean": {"image": Part(dataclasses.replace(TIMM, pool="mean"), PLAIN), "text": CLIP["text"]},
    "class": {"image": Part(TIMM, (Dense(10, True, "identity"),)), "text": CLIP["text"]},
    "resnet": {"image": Part(RESNET), "text": CLIP["text"]},
    "no projection": {"image": Part(TIMM), "text": Part(dataclasses.replace(CLIP["text"].arch, width=16, heads=2))},
}


@pytest.fixture(autouse=True)
def small_timm(monkeypatch):
    """timm's models here are small ones."""
    pools = {"vit_s": "cls", "vit_s_siglip": "map", "vit_s_siglip_gap": "mean"}
    monkeypatch.setattr(timm, "VITS", {name: dataclasses.replace(TIMM, pool=pool) for name, pool in pools.items()})


def random_params(found, **loss):
    build = {"image": image_tower, "text": text_tower}
    towers = {side: params_of(build[side](part.arch, dense=part.dense), n) for n, (side, part) in enumerate(found.items())}
    return {"towers": towers, "loss": {name: np.float32(value) for name, value in loss.items()}}


def equal(left, right):
    import jax

    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def written(found, loss=None):
    return json.loads(json.dumps({"model_cfg": to_config(found, loss or {})}))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    found = MODELS[name]
    biased = {"bias": -3.5} if found["text"].arch.fills else {}
    params = random_params(found, scale=1.5, **biased)
    tensors = to_tensors(found, params)
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in tensors.values())
    equal(from_tensors(found, tensors, file="x"), params)
    config = written(found, params["loss"])
    assert {side: part._replace(arch=plain(part.arch)) for side, part in parts(config, file="x").items()} == {
        side: part._replace(arch=plain(part.arch)) for side, part in found.items()
    }
    assert ("init_logit_bias" in config["model_cfg"]) == bool(biased)


def plain(arch):
    """What a folder does not say."""
    return dataclasses.replace(arch, init_std=0.02) if hasattr(arch, "init_std") else arch


def test_orientation():
    """Projections lie as ours do, those of layers transposed; fused ones are q, k, v, and of the pooling's attention k, v."""
    tensors = to_tensors(CLIP, params := random_params(CLIP))
    towers = params["towers"]
    np.testing.assert_array_equal(tensors["visual.proj"], towers["image"]["dense"]["0"]["kernel"])
    np.testing.assert_array_equal(tensors["text_projection"], towers["text"]["dense"]["0"]["kernel"])
    fused, attn = tensors["transformer.resblocks.1.attn.in_proj_weight"], towers["text"]["encoder"]["blocks"]["attn"]
    for n, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(fused[24 * n : 24 * n + 24], attn[part]["kernel"][1].T)
    assert tensors["visual.class_embedding"].shape == (16,) and tensors["visual.positional_embedding"].shape == (10, 16)
    assert tensors["visual.conv1.weight"].shape == (16, 3, 4, 4) and tensors["logit_scale"].shape == ()
    tensors = to_tensors(SIGLIP, params := random_params(SIGLIP))
    head = params["towers"]["image"]["encoder"]["head"]["attn"]
    np.testing.assert_array_equal(tensors["visual.trunk.attn_pool.kv.weight"][16:], head["value"]["kernel"].T)
    np.testing.assert_array_equal(tensors["visual.trunk.attn_pool.q.weight"], head["query"]["kernel"].T)
    kernel = params["towers"]["text"]["dense"]["0"]["kernel"]
    np.testing.assert_array_equal(tensors["text.text_projection.weight"], kernel.T)
    assert tensors["logit_bias"] == -10 and tensors["logit_scale"] == pytest.approx(np.log(10))


def test_files_as_others_write_them():
    """Numbers with an axis, and a plain tower of texts under "text."."""
    tensors = to_tensors(CLIP, params := random_params(CLIP, scale=2))
    nested = {name if name.startswith(("visual.", "logit_")) else f"text.{name}": x for name, x in tensors.items()}
    nested["logit_scale"] = nested["logit_scale"].reshape(1)
    equal(from_tensors(CLIP, nested, file="x"), params)
    config = written(CLIP)
    config["model_cfg"]["vision_cfg"] |= {
        "image_size": [12, 12],
        "patch_size": [4, 4],
        "timm_pool": "avg",
        "patch_dropout": 0.5,
    }
    config["model_cfg"]["text_cfg"] |= {"hf_proj_type": "mlp", "tokenizer_kwargs": {"clean": "canonicalize"}}
    assert parts(config, file="x")["image"] == parts(written(CLIP), file="x")["image"]
    published = {  # ViT-B-32 of open_clip
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    found = parts({"model_cfg": published}, file="x")
    assert found["image"].arch == Vit(224, 32, norm_eps=1e-5, input_norm=True, patch_bias=False)
    assert found["text"] == Part(ClipText(activation="gelu", pad_id=0, eos_id=49407), (Dense(512, False, "identity"),))


def test_every_surprise_is_told_in_one_error():
    tensors = to_tensors(CLIP, random_params(CLIP))
    tensors["adapter.weight"] = tensors["visual.transformer.resblocks.3.ln_1.bias"] = np.ones(8, np.float32)
    del tensors["logit_scale"], tensors["transformer.resblocks.1.mlp.c_fc.bias"]
    tensors["visual.proj"] = np.ones((4, 8), np.float32)
    tensors["ln_final.gamma"] = np.ones(24, np.float32)
    tensors["visual.ln_pre.weight"] = np.ones(16, np.int32)
    with pytest.raises(ConfigError) as caught:
        from_tensors(CLIP, tensors, file="here")
    told = str(caught.value)
    assert told.startswith("here does not hold the tensors of Vit and ClipText") and "\n" not in told
    for part in (
        "unknown: visual.transformer.resblocks.3.ln_1.bias, adapter.weight",
        "missing: logit_scale, transformer.resblocks.1.mlp.c_fc.bias",
        "doubly set: ln_final.gamma",
        "visual.proj is [4, 8], expected [16, 10]",
        "visual.ln_pre.weight holds int32",
    ):
        assert part in told, told


@pytest.mark.parametrize(
    ("side", "changes", "told"),
    [
        ("", {"vision_cfg": 3}, "vision_cfg is 3; expected an object"),
        ("", {"embed_dim": ...}, "has no 'embed_dim'"),
        ("", {"multimodal_cfg": {}}, "write captions"),
        ("vision_cfg", {"layers": [1, 1, 1]}, "four stages"),
        ("vision_cfg", {"layers": [1, 1, 1, 1], "attentional_pool": True}, "attentional_pool is True"),
        ("vision_cfg", {"layers": "3"}, "'3' is not|not supported between"),
        ("vision_cfg", {"width": 16.0}, "16.0 .width. should be of type int"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool is True, which is not supported"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type is 'avg'; expected 'tok'"),
        ("vision_cfg", {"ls_init_value": 0.1}, "ls_init_value"),
        ("vision_cfg", {"image_size": [12, 16]}, "squares"),
        ("vision_cfg", {"head_width": 0}, "division"),
        ("vision_cfg", {"timm_model_name": "vit_x_siglip"}, "did you mean 'vit_s_siglip'"),
        ("vision_cfg", {"timm_model_name": "vit_s", "timm_pool": "avg"}, "is supported with 'token'"),
        ("vision_cfg", {"timm_model_name": "vit_s", "timm_pool": "", "image_size": 24}, "sees pictures of 12"),
        ("vision_cfg", {"timm_model_name": "vit_s", "timm_pool": "", "timm_proj": "mlp"}, "timm_proj is 'mlp'"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "'roberta-base': its sizes are not in the folder"),
        ("text_cfg", {"pool_type": "last"}, "with a causal mask argmax or eos"),
        ("text_cfg", {"no_causal_mask": True}, "without a causal mask last"),
        ("text_cfg", {"embed_cls": True}, "embed_cls"),
        ("text_cfg", {"act_kwargs": {"approximate": "much"}}, "act_kwargs"),
        ("text_cfg", {"norm_kwargs": {"bias": False}}, "norm_kwargs"),
        ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs"),
        ("text_cfg", {"heads": 5}, "not divisible"),
    ],
)
def test_configs_that_are_refused(side, changes, told):
    config = written(CLIP)
    inner = config["model_cfg"][side] if side else config["model_cfg"]
    inner |= changes
    for key in [key for key, value in changes.items() if value is ...]:
        del inner[key]
    with pytest.raises(ConfigError, match=f"here.*{told}"):
        parts(config, file="here")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (change(CLIP, "image", activation="quick_gelu"), "both towers or in none; these have quick_gelu and gelu"),
        (change(CLIP, "text", activation="relu"), "ClipText has activation 'relu'"),
        (change(CLIP, "image", registers=1), "1 registers"),
        (change(SIGLIP, "image", activation="gelu_tanh"), "timm's vit_s_siglip, has activation gelu, not gelu_tanh"),
        (change(SIGLIP, "image", patch=6), "has patch 4, not 6"),
        ({**CLIP, "image": Part(RESNET, PLAIN)}, "a ModifiedResnet has the projections"),
        ({**CLIP, "image": Part(Resnet(channels=(8, 10), depths=(1, 1), block="basic"))}, "open_clip has no Resnet"),
        ({**CLIP, "image": Part(IMAGE)}, "the image tower has the projections ..; in open_clip it has one projection"),
        ({**CLIP, "image": Part(IMAGE, WIDE)}, "without activation and bias"),
        ({**CLIP, "text": CLIP["text"]._replace(dense=(Dense(10, True, "tanh"),))}, "at most one projection"),
        ({**CLIP, "text": CLIP["text"]._replace(dense=PLAIN * 2)}, "at most one projection"),
        ({**CLIP, "text": CLIP["text"]._replace(dense=WIDE)}, "vectors of 10 and 16 numbers"),
    ],
)
def test_towers_that_open_clip_has_not(found, told):
    with pytest.raises(ConfigError, match=told):
        to_config(found, {})


def test_preprocessing():
    for pixels in (Pixels(), Pixels(fit="squash", interpolation="bilinear"), Pixels((0.5,) * 3, (0.25, 0.5, 1.0))):
        assert open_clip.pixels(json.loads(json.dumps(open_clip.from_pixels(pixels, 20))), file="x") == pixels
    assert open_clip.pixels({}, file="x") == Pixels()
    with pytest.raises(ConfigError, match="shorter is 24"):
        open_clip.from_pixels(Pixels(shorter=24), 20)
    with pytest.raises(ConfigError, match="'lanczos'"):
        open_clip.from_pixels(Pixels(interpolation="lanczos"), 20)
    for config, told in (
        ({"resize_mode": "longest"}, "resize_mode 'longest'"),
        ({"interpolation": "box"}, "interpolation 'box'"),
        ({"mean": [1, 2]}, "three numbers"),
    ):
        with pytest.raises(ConfigError, match=f"here: .*{told}"):
            open_clip.pixels(config, file="here")


def test_timms_table():
    """One of each published size, and no two alike."""
    table = {**TABLE}
    assert len(table) == len({timm._shape(arch).__repr__() for arch in table.values()}) > 40
    assert table["vit_so400m_patch14_siglip_384"].mlp == 4304 and table["vit_tiny_patch16_224"].heads == 3


TABLE = dict(timm.VITS)

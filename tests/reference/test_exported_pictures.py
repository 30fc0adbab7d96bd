"""Exported models of pictures in the libraries that are said to load them: the same vectors of texts and of real photos."""

import dataclasses

import gallery
import numpy as np
import pytest
from PIL import Image

from embedjax import config as c
from embedjax.evaluate.encode import encode
from embedjax.export import export, gate
from embedjax.load import load
from embedjax.models import timm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TEXTS = ["a red bicycle", "Two cats asleep, in the sun on a street by the old house!", "", "zebra"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two real photos, 640 x 427, as files; the second upright."""
    from sklearn.datasets import load_sample_images

    folder, first, second = tmp_path_factory.mktemp("photos"), *load_sample_images().images
    for name, photo in (("a.png", Image.fromarray(first)), ("b.png", Image.fromarray(second).rotate(90, expand=True))):
        photo.save(folder / name)
    return [str(folder / "a.png"), str(folder / "b.png")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: gallery.model(folder / name, *towers) for name, towers in gallery.PAIRS.items()}


def opened(photos):
    return [Image.open(photo) for photo in photos]


def ours(model, photos):
    return encode(model, TEXTS, column="query"), encode(model, photos, column="document")


def pooled(found):
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_in_transformers(name, models, photos, tmp_path):
    """By AutoModel and AutoProcessor, from files to vectors."""
    export(models[name], tmp_path / "out", "hf")
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == {"clip": "CLIPModel", "siglip": "SiglipModel"}[name]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text=TEXTS, images=opened(photos), padding="max_length", truncation=True, return_tensors="pt")
    assert ("attention_mask" in inputs) == (name == "clip"), "SigLIP's padding counts as text"
    pixels = {"pixel_values": inputs.pop("pixel_values")}
    with torch.no_grad():
        theirs = pooled(model.eval().get_text_features(**inputs)), pooled(model.get_image_features(**pixels))
    for found, wanted in zip(theirs, ours(models[name], photos), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    found = gate.check(tmp_path / "out")
    assert found["transformers"] < 1e-4 and found["sentence-transformers"] == "does not read this format"


@pytest.mark.parametrize("name", ["vit", "clip", "map", "mean", "resnet"])
def test_one_image_tower_in_transformers_and_sentence_transformers(name, photos, tmp_path):
    arch = {"vit": gallery.VIT, "clip": gallery.CLIP_VIT, "map": gallery.SIGLIP_VIT, "resnet": gallery.RESNET}.get(
        name, dataclasses.replace(gallery.VIT, pool="mean")
    )
    made = gallery.model(tmp_path, gallery.image(arch))
    export(made, tmp_path / "hf", "hf")
    assert gate.check(tmp_path / "hf")["transformers"] < 1e-4
    made = gallery.model(tmp_path, gallery.image(arch, dense=(c.Dense(7, True, "tanh"), c.Dense(5, False, "identity"))))
    export(made, tmp_path / "out")
    assert gate.check(tmp_path / "out")["sentence-transformers"] < 1e-4
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(peer.encode(opened(photos)), encode(made, photos), atol=1e-4)


@pytest.mark.parametrize("name", gallery.PAIRS)
def test_in_sentence_transformers(name, models, photos, tmp_path):
    """A CLIPModel, a SiglipModel, and routes by what is embedded: texts and PIL pictures."""
    export(models[name], tmp_path / "out")
    found = gate.check(tmp_path / "out")
    gate.judge(tmp_path / "out", found)
    assert found["sentence-transformers"] < 1e-4
    peer = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts, pictures = ours(models[name], photos)
    ask = peer.encode_query if "query" in peer.prompts else peer.encode
    np.testing.assert_allclose(ask(TEXTS), texts, atol=1e-4)
    np.testing.assert_allclose(peer.encode(opened(photos)), pictures, atol=1e-4)
    np.testing.assert_allclose(peer.similarity(texts, pictures).numpy(), texts @ pictures.T, atol=1e-5)
    # What it writes of the same model is read again.
    peer.save_pretrained(str(tmp_path / "again"))
    for again, wanted in zip(ours(load(tmp_path / "again"), photos), (texts, pictures), strict=True):
        np.testing.assert_allclose(again, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_alone_in_transformers(name, tmp_path):
    """A plain folder of a tower of texts, with the projection that is its own."""
    made = gallery.model(tmp_path / "tokenizer", text=gallery.PAIRS[name][1])
    export(made, tmp_path / "out", "hf")
    kind = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}[name]
    model = getattr(transformers, kind).from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        out = model(**tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt"))
    np.testing.assert_allclose(
        pooled(out.text_embeds if name == "clip" else out), encode(load(tmp_path / "out"), TEXTS), atol=1e-4
    )
    if name == "clip":
        export(made, tmp_path / "st")
        assert gate.check(tmp_path / "st")["sentence-transformers"] < 1e-4


@pytest.fixture
def open_clip():
    pytest.importorskip("torchvision")
    return pytest.importorskip("open_clip")


SMALL = {"img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 40 / 24}
FORMS = {
    "vit_s": ({}, {}),
    "vit_s_siglip": ({"pool": "map"}, {"class_token": False, "global_pool": "map"}),
    "vit_s_siglip_gap": ({"pool": "mean"}, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
}


@pytest.fixture
def small_timm(monkeypatch):
    """Small models of timm's: in its registry and in our table."""
    library, vision = pytest.importorskip("timm.models"), pytest.importorskip("timm.models.vision_transformer")
    for name, (arch, form) in FORMS.items():

        def build(pretrained=False, form=form, **options):
            asked = {key: value for key, value in options.items() if key in ("num_classes", "global_pool")}
            model = vision.VisionTransformer(**SMALL | form | asked)
            model.default_cfg = {}
            return model

        build.__name__, build.__module__ = name, vision.__name__
        if not library.is_model(name):
            library.register_model(build)
        monkeypatch.setitem(timm.VITS, name, dataclasses.replace(gallery.VIT, init_std=0.02, **arch))


def with_image(arch, text=gallery.CLIP_TEXT, dense=gallery.PLAIN, **more):
    return gallery.image(arch, dense=dense, **more), text


TANH = dataclasses.replace(gallery.CLIP_VIT, activation="gelu_tanh", norm_eps=1e-6)
GELU = gallery.text(c.ClipText(**gallery.TEXT, pad_id=0, eos_id=3, activation="gelu"), dense=(c.Dense(10, True, "identity"),))
SIGLIP = dataclasses.replace(gallery.SIGLIP_VIT, activation="gelu")
IN_OPEN_CLIP = {
    "clip": gallery.PAIRS["clip"],
    "gelu": with_image(TANH, GELU, pixels=gallery.SQUASHED),
    "no norm": with_image(dataclasses.replace(gallery.CLIP_VIT, input_norm=False)),
    "siglip": with_image(SIGLIP, gallery.SIGLIP_TEXT, (), pixels=gallery.SQUASHED),
    "resnet": with_image(gallery.MODIFIED, dense=(), pixels=gallery.SQUASHED),
    "mean": with_image(dataclasses.replace(gallery.VIT, pool="mean")),
    "class": with_image(gallery.VIT, dense=(c.Dense(10, True, "identity"),)),
}


@pytest.mark.parametrize("name", IN_OPEN_CLIP)
def test_in_open_clip(name, open_clip, small_timm, photos, tmp_path):
    made = gallery.model(tmp_path / "tokenizer", *IN_OPEN_CLIP[name])
    export(made, tmp_path / "out", "open-clip")
    found = gate.check(tmp_path / "out")
    assert found["open_clip"] < 1e-4 and found["transformers"] == "does not read this format"
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        texts = model.eval().encode_text(tokenizer(TEXTS), normalize=True)
        pictures = model.encode_image(torch.stack([prepare(photo) for photo in opened(photos)]), normalize=True)
    wanted = ours(made, photos)
    np.testing.assert_allclose(texts.numpy(), wanted[0], atol=1e-4)
    # Both photos scale to 29 x 20: an odd rest of 9 cuts alike.
    np.testing.assert_allclose(pictures.numpy(), wanted[1], atol=1e-4)
    # And the folder that open_clip writes of it is read.
    import safetensors.torch

    (tmp_path / "out" / "open_clip_model.safetensors").unlink()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "out" / "open_clip_model.safetensors")
    for again, expected in zip(ours(load(tmp_path / "out"), photos), wanted, strict=True):
        np.testing.assert_allclose(again, expected, atol=1e-5)


def test_texts_are_cleaned_as_open_clip_cleans_siglips(open_clip, small_timm, tmp_path):
    import json

    made = gallery.model(tmp_path / "tokenizer", *IN_OPEN_CLIP["siglip"])
    export(made, tmp_path / "out", "open-clip")
    file = tmp_path / "out" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    file.write_text(json.dumps(config))
    texts = ["A  red_bicycle!", "Two cats (asleep): in the SUN", "the old-house"]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(texts).numpy()
    columns = load(tmp_path / "out").texts["text"].encode(texts)
    np.testing.assert_array_equal(columns["ids"], tokens)
    # It is kept where the tokenizer goes on to.
    export(load(tmp_path / "out"), tmp_path / "hf", "hf")
    np.testing.assert_array_equal(load(tmp_path / "hf").texts["text"].encode(texts)["ids"], tokens)


def test_timms_table_is_timms(open_clip):
    """Sizes, pooling and activation of each model that we name."""
    import timm as library

    for name, arch in timm.VITS.items():
        with torch.device("meta"):
            model = library.create_model(name, num_classes=0)
        block = model.blocks[0]
        tanh = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}[type(block.mlp.act).__name__]
        found = (model.patch_embed.img_size[0], model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks))
        assert found == (arch.image, arch.patch, arch.width, arch.depth), name
        assert (block.attn.num_heads, block.mlp.fc1.out_features, tanh) == (arch.heads, arch.mlp, arch.activation), name
        assert (block.norm1.eps, model.global_pool) == (arch.norm_eps, timm.POOLS[arch.pool]), name
        assert type(model.fc_norm).__name__ == "Identity" and (model.cls_token is not None) == (arch.pool == "cls"), name

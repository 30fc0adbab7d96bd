"""Exported models of pictures: the gate looks at texts and pictures, and the command line writes and checks every format."""

import dataclasses
import io
import json
import re

import gallery
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.evaluate.encode import encode
from embedjax.export import check_format, consumers, export, gate
from embedjax.load import load
from embedjax.models import joint, open_clip

FIRST = "sentence-transformers"
FORMATS = [
    ("clip", "hf"),
    ("clip", "open-clip"),
    ("clip", "sentence-transformers"),
    ("siglip", "hf"),
    ("siglip", "sentence-transformers"),
    ("bert", "sentence-transformers"),
]


def picture(seed=0, size=(30, 24)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_reader(monkeypatch):
    """Others are asked in tests/reference."""
    monkeypatch.setattr(consumers, "_installed", lambda package: False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    loss = {"scale": 3.0}
    made = {name: gallery.model(folder / name, *gallery.PAIRS[name], loss) for name in ("clip", "siglip", "bert")}
    return made | {"vit": gallery.model(folder, gallery.image(dense=gallery.PLAIN))}


@pytest.mark.parametrize(("name", "format"), FORMATS)
def test_texts_and_pictures_are_tried_and_kept(name, format, models, tmp_path, capsys):
    given = [picture(n, (60 + n, 50)) for n in range(3)]
    assert export(models[name], tmp_path / "out", format, texts=["a red bicycle"], pictures=given) < 1e-6
    record = json.loads((tmp_path / "out" / "parity" / "parity.json").read_text())
    assert len(record["texts"]) >= 256 and record["texts"][0] == "a red bicycle" and record["pictures"] == 64
    vectors = safetensors.numpy.load_file(tmp_path / "out" / "parity" / "parity.safetensors")
    width = models[name].embedders["image"].width
    assert {way: x.shape for way, x in vectors.items()} == {"texts": (len(record["texts"]), width), "pictures": (64, width)}
    assert np.abs(vectors["pictures"][0] - vectors["pictures"][9]).max() > 1e-3
    kept = Image.open(tmp_path / "out" / "parity" / "00.png")
    assert kept.size == (33, 40), "no larger than twice the tower's pictures"
    assert run(["export", str(tmp_path / "out"), "--check"]) == 0
    assert "embedjax\tlargest difference" in capsys.readouterr().out
    # The same vectors for what was never tried, by the folder's own model.
    read = load(tmp_path / "out")
    np.testing.assert_allclose(
        encode(read, given, column="document"), encode(models[name], given, column="document"), atol=1e-5
    )
    texts = encode(read, ["the quiet river"], column="query"), encode(models[name], ["the quiet river"], column="query")
    np.testing.assert_allclose(*texts, atol=1e-5)


def test_one_image_tower_is_asked_for_pictures_alone(models, tmp_path):
    for format in ("hf", "sentence-transformers"):
        assert export(models["vit"], tmp_path / format, format) < 1e-6
        assert json.loads((tmp_path / format / "parity" / "parity.json").read_text())["texts"] == []
        found = gate.check(tmp_path / format)
        assert found["embedjax"] < 1e-6 and found["open_clip"] == "does not read this format"
    assert load(tmp_path / "hf").embedders["image"].width == 24, "a ViT of Hugging Face's has no projection"
    assert load(tmp_path / "sentence-transformers").embedders["image"].width == 10


def test_pictures_that_are_made_are_always_the_same():
    made = gate.sample_pictures(20)
    assert len(made) == 64 and made == gate.sample_pictures(20) and len({picture.size for picture in made}) > 30
    assert all(15 <= side < 40 for picture in made for side in picture.size)


@pytest.mark.parametrize(("name", "format"), FORMATS[:4])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_wrong_weight_of_either_side_fails(name, format, side, models, tmp_path, monkeypatch, capsys):
    original = joint.to_tensors

    def damaged(*arguments):
        tensors = dict(original(*arguments))
        hidden = [name for name in tensors if re.search(r"(fc1|c_fc)\.weight$", name)]
        name = next(name for name in hidden if name.startswith("vis") == (side == "image"))
        tensors[name] = np.array(tensors[name])
        tensors[name][3, 5] += 0.2
        return tensors

    monkeypatch.setattr(joint, "to_tensors", damaged)
    with pytest.raises(CheckFailed, match="vectors read by embedjax differ by .* at most 1e-04") as failed:
        export(models[name], tmp_path / "out", format)
    assert failed.value.code == 6 and not (tmp_path / "out").exists()


def test_a_folder_that_was_changed_is_told(models, tmp_path, capsys):
    export(models["clip"], tmp_path / "out", "hf")
    file = tmp_path / "out" / "preprocessor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"resample": 0}))
    assert run(["export", str(tmp_path / "out"), "--check"]) == 6
    assert "differ by" in capsys.readouterr().err
    file.write_text(json.dumps(config))
    (tmp_path / "out" / "parity" / "07.png").unlink()
    assert run(["export", str(tmp_path / "out"), "--check"]) == 2
    assert "to check against" in capsys.readouterr().err


def test_the_command_writes_every_format_from_any_other(models, tmp_path, capsys):
    export(models["clip"], tmp_path / "hf", "hf")
    for source, format in (("hf", "open-clip"), ("open-clip", "sentence-transformers"), ("sentence-transformers", "hf")):
        out = tmp_path / f"from {source}"
        assert run(["export", str(tmp_path / source), str(out), "--format", format]) == 0
        if not (tmp_path / format).exists():
            out.rename(tmp_path / format)
    first, last = (load(folder) for folder in (tmp_path / "hf", tmp_path / "from sentence-transformers"))
    np.testing.assert_array_equal(
        first.params["towers"]["image"]["encoder"]["blocks"]["up"]["kernel"],
        last.params["towers"]["image"]["encoder"]["blocks"]["up"]["kernel"],
    )
    assert float(last.details["loss"]["scale"]) == 3
    assert float(safetensors.numpy.load_file(tmp_path / "open-clip" / f"{open_clip.STEM}.safetensors")["logit_scale"]) == 3
    assert run(["export", str(tmp_path / "hf"), str(tmp_path / "x"), "--format", "open-clap"]) == 2


def test_a_format_that_does_not_hold_the_model_is_refused_before_training(models):
    check = lambda name, format: check_format(models[name].config, format)
    check("bert", "sentence-transformers")
    with pytest.raises(ConfigError, match="a Bert pooled by 'mean'"):
        check("bert", "hf")
    with pytest.raises(ConfigError, match="beside that of pictures"):
        check("vit", "open-clip")
    both = {"a": gallery.image(), "b": gallery.image()}
    with pytest.raises(ConfigError, match="two image towers"):
        check_format(c.Model(both, {"anchor": "a", "positive": "b"}), "hf")
    with pytest.raises(ConfigError, match="beside that of texts"):
        check_format(c.Model({"text": gallery.BERT}), "open-clip")
    with pytest.raises(ConfigError, match="a SiglipText without SigLIP's tower of pictures"):
        check_format(c.Model({"text": gallery.SIGLIP_TEXT}), "sentence-transformers")
    apart = (gallery.image(gallery.SIGLIP_VIT, dense=gallery.WIDE), gallery.SIGLIP_TEXT)
    with pytest.raises(ConfigError, match="a SiglipText without SigLIP's tower of pictures"):
        check_format(c.Model(dict(zip(("image", "text"), apart, strict=True)), {"anchor": "text", "positive": "image"}), FIRST)
    with pytest.raises(ConfigError, match="Hugging Face's has one"):
        check_format(c.Model({"text": dataclasses.replace(gallery.SIGLIP_TEXT, dense=())}), "hf")


@pytest.mark.parametrize(("name", "format"), [*FORMATS, ("vit", "hf"), ("vit", "sentence-transformers")])
def test_the_card_says_what_the_model_sees_and_how_to_use_it(name, format, models, tmp_path):
    import yaml

    from embedjax.export.card import card

    told = card(models[name], "mine", {"zero-shot/top-1": 0.5}, format)
    _, front, body = told.split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    compile(code, "card", "exec")
    library = {"hf": "transformers", "open-clip": "open_clip"}.get(format, format)
    assert yaml.safe_load(front)["library_name"] == library and library.replace("-", "_") in code
    assert "20 x 20 pixels" in body and "patches of 4 pixels" in body and "| zero-shot/top-1 | 0.5000 |" in body
    assert ("Maps texts and pictures" if name != "vit" else "Maps pictures") in body
    assert ("| find: |" in body or "`find: `" in body) == (name == "bert")

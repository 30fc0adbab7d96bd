"""Small random CLIP, SigLIP and ViT models of transformers: vectors and the gradient of every parameter, and the files both
ways; positions of another resolution; CLIP's tokenizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from embedjax.config import ClipText, Dense, Pixels, SiglipText, Tower, Vit
from embedjax.data.tokenizer import load_tokenizer
from embedjax.load import make_texts
from embedjax.models import clip, weights
from embedjax.models.embedder import Embedder
from embedjax.models.families import vit
from embedjax.models.image import ImageEmbedder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TEXT = {"vocab_size": 61, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "positions": 20, "init_std": 0.15}
IMAGE = Vit(image=20, patch=4, width=36, depth=2, heads=3, mlp=40, activation="gelu")
FORMS = {
    "clip": {
        "image": clip.Part(
            dataclasses.replace(IMAGE, input_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5),
            (Dense(10, False, "identity"),),
        ),
        "text": clip.Part(ClipText(**TEXT, pad_id=60, eos_id=60), (Dense(10, False, "identity"),)),
    },
    "siglip": {
        "image": clip.Part(dataclasses.replace(IMAGE, pool="map", activation="gelu_tanh", image=22)),
        "text": clip.Part(SiglipText(**TEXT), (Dense(36, True, "identity"),)),
    },
    "vit": {"image": clip.Part(IMAGE)},
}
PIXELS = Pixels(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))


def theirs(name, folder):
    """A random transformers model from our config, saved to a folder, norms and biases random too."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(clip.to_hf(FORMS[name])))
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def read(folder):
    config = json.loads((folder / "config.json").read_text())
    found = clip.parts(config, file=folder)
    return found, clip.from_tensors(found, weights.load_tensors(folder), file=folder)


def embedders(found, **how):
    made = {}
    for side, part in found.items():
        if isinstance(part.arch, Vit):
            made[side] = ImageEmbedder(part.arch, PIXELS, dense=part.dense, normalize=False, **how)
        else:
            made[side] = Embedder(part.arch, clip.POOLING, dense=part.dense, normalize=False, **how)
    return made


def batch(found):
    """Pictures and texts; CLIP's texts end in a token that also pads, SigLIP's are filled."""
    rng = np.random.default_rng(0)
    side = found["image"].arch.image
    columns = {"image": {"pixels": rng.integers(0, 256, (3, side, side, 3)).astype(np.uint8)}}
    if "text" in found:
        arch, lengths = found["text"].arch, np.array([20, 9, 2])
        places = np.arange(20)[None]
        ids = np.where(
            places < lengths[:, None] - 1, rng.integers(3, 60, (3, 20)), 60 if isinstance(arch, ClipText) else arch.pad_id
        )
        mask = (places < lengths[:, None]) | arch.fills
        columns["text"] = {"ids": ids.astype(np.int32), "mask": mask}
    return columns


def in_torch(model, columns):
    """The vectors of `transformers`, normalised pictures going in."""
    x = (columns["image"]["pixels"] / 255 - np.array(PIXELS.mean)) / np.array(PIXELS.std)
    pixels = torch.tensor(x.transpose(0, 3, 1, 2).astype(np.float32))
    if "text" not in columns:
        return {"image": model(pixels).last_hidden_state[:, 0]}
    ids, mask = (torch.tensor(columns["text"][name].astype(np.int64)) for name in ("ids", "mask"))
    features = {"image": model.get_image_features(pixels), "text": model.get_text_features(ids, attention_mask=mask)}
    return {side: getattr(found, "pooler_output", found) for side, found in features.items()}


def difference(ours, reference):
    """Largest difference, relative to the largest value of the reference."""
    return np.abs(np.asarray(ours) - reference).max() / max(np.abs(reference).max(), 1e-6)


@pytest.mark.parametrize(("name", "how"), [("clip", "unroll"), ("clip", "scan"), ("siglip", "unroll"), ("vit", "unroll")])
def test_vectors_and_gradients_match_transformers(name, how, tmp_path):
    model = theirs(name, tmp_path / "hf")
    found, params = read(tmp_path / "hf")
    assert found == FORMS[name]
    columns, made = batch(found), embedders(found, layers=how)
    expected = in_torch(model, columns)
    rng = np.random.default_rng(1)
    cotangent = {side: rng.normal(size=x.shape).astype(np.float32) for side, x in expected.items()}
    sum((x * torch.tensor(cotangent[side])).sum() for side, x in expected.items()).backward()

    def loss(towers):
        vectors = {side: embedder.apply(towers[side], columns[side]).pooled for side, embedder in made.items()}
        return sum((x * cotangent[side]).sum() for side, x in vectors.items()), vectors

    (_, vectors), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params["towers"]))
    worst = {side: difference(vectors[side], x.detach().numpy()) for side, x in expected.items()}
    assert max(worst.values()) < 1e-4, worst
    with torch.no_grad():  # gradients under the names of the file, which are not those in memory
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradient")
    reference = weights.load_tensors(tmp_path / "gradient")
    gradients = clip.to_tensors(found, {"towers": jax.device_get(gradient)})
    left_out = {name for name in reference if name.startswith(("logit_", "pooler."))}
    assert gradients.keys() | left_out == reference.keys() | left_out
    apart = {}
    for tensor in reference.keys() - left_out:
        # Key biases shift every score of a row alike: their gradient is rounding, on both sides.
        rounding = np.abs(reference[tensor]).max() < 1e-4 and np.abs(gradients[tensor]).max() < 1e-4
        if "in_proj_bias" in tensor:
            parts = np.split(gradients[tensor], 3), np.split(reference[tensor], 3)
            assert np.abs(parts[0][1]).max() < 1e-4 and np.abs(parts[1][1]).max() < 1e-4
        apart[tensor] = 0 if rounding else difference(gradients[tensor], reference[tensor])
    print(name, how, worst, "gradient", max(apart.values()))
    assert max(apart.values()) < 1e-4, {tensor: value for tensor, value in apart.items() if value >= 1e-4}


def test_tokens_of_all_patches_match_transformers(tmp_path):
    """CLIP normalises only its class token; ours all, which is the same to it."""
    for name in FORMS:
        model = theirs(name, tmp_path / name)
        found, params = read(tmp_path / name)
        columns = batch({"image": found["image"]})
        tower = embedders({"image": found["image"]})["image"]
        tokens = jax.jit(lambda p, c, tower=tower: tower.apply(p, c, want=("tokens",)).tokens)(
            params["towers"]["image"], columns["image"]
        )
        pixels = tower.numbers(columns["image"]["pixels"], row=jnp.arange(3)).transpose(0, 3, 1, 2)
        with torch.no_grad():
            vision = model if name == "vit" else model.vision_model
            expected = vision(torch.tensor(np.asarray(pixels))).last_hidden_state
            expected = vision.post_layernorm(expected) if name == "clip" else expected
        assert difference(tokens, expected.numpy()) < 1e-4


@pytest.mark.parametrize("name", FORMS)
def test_written_files_load_in_transformers_without_missing_or_unexpected_tensors(name, tmp_path):
    found = FORMS[name]
    made = embedders(found)
    towers = {side: jax.jit(embedder.init)(jax.random.key(1)) for side, embedder in made.items()}
    (tmp_path / "config.json").write_text(json.dumps(clip.to_hf(found)))
    tensors = clip.to_tensors(found, {"towers": towers})
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    odd = {tensor for tensor in report["missing_keys"] if not tensor.startswith("pooler.")}
    assert not odd and not report["unexpected_keys"] and not report["mismatched_keys"]
    columns = batch(found)
    with torch.no_grad():
        expected = in_torch(model.eval(), columns)
    for side, vectors in expected.items():
        assert difference(made[side].apply(towers[side], columns[side]).pooled, vectors.numpy()) < 1e-4


HALVES = ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPTextModel", "CLIPTextModelWithProjection"]
HALVES += ["SiglipVisionModel", "SiglipTextModel", "ViTForImageClassification"]


@pytest.mark.parametrize("kind", HALVES)
def test_halves_that_transformers_writes_are_read(kind, tmp_path):
    name = kind[:6].lower() if kind.startswith("Sig") else kind[:4].lower() if kind.startswith("CLIP") else "vit"
    side = "text" if "Text" in kind else "image"
    config = theirs(name, tmp_path / "hf").config
    half = config if name == "vit" else config.text_config if side == "text" else config.vision_config
    torch.manual_seed(1)
    model = getattr(transformers, kind)(half).eval()
    model.save_pretrained(tmp_path / "half")
    found, params = read(tmp_path / "half")
    assert found.keys() == {side} and found[side].arch == FORMS[name][side].arch
    assert bool(found[side].dense) == ("Projection" in kind or kind == "SiglipTextModel")
    columns = batch(FORMS[name])
    ours = embedders(found)[side].apply(params["towers"][side], columns[side]).pooled
    with torch.no_grad():
        if side == "text":
            ids, mask = (torch.tensor(columns["text"][key].astype(np.int64)) for key in ("ids", "mask"))
            out = model(ids, attention_mask=mask)
        else:
            pixels = embedders(found)[side].numbers(columns["image"]["pixels"], row=jnp.arange(3)).transpose(0, 3, 1, 2)
            model = model.vit if name == "vit" else model
            out = model(torch.tensor(np.asarray(pixels)))
    keys = ("image_embeds", "text_embeds", "pooler_output") if name != "vit" else ()
    expected = next((out[key] for key in keys if key in out), None)
    expected = out.last_hidden_state[:, 0] if expected is None else expected
    assert difference(ours, expected.numpy()) < 1e-4


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("image", [12, 36])
def test_another_resolution_is_that_of_interpolate_pos_encoding(name, image, tmp_path):
    model = theirs(name, tmp_path / "hf")
    found, params = read(tmp_path / "hf")
    old = found["image"].arch
    new = dataclasses.replace(old, image=image)
    encoder = vit.resized(params["towers"]["image"]["encoder"], old, new)
    x = np.random.default_rng(0).normal(size=(2, image, image, 3)).astype(np.float32)
    tokens, _ = jax.jit(vit.Tower(new).apply)({"params": encoder}, x)
    ours = vit.pool(new, encoder, tokens, compute="float32")
    vision = model if name == "vit" else model.vision_model
    with torch.no_grad():
        out = vision(torch.tensor(x.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True)
    expected = out.last_hidden_state[:, 0] if name == "vit" else out.pooler_output
    assert difference(ours, expected.numpy()) < 1e-4


# ---- texts


def test_clip_pools_where_transformers_does(tmp_path):
    """Ours the last token of the mask, theirs the first end of text; padded with it or with another."""
    model = theirs("clip", tmp_path / "hf")
    found, params = read(tmp_path / "hf")
    embedder = embedders(found)["text"]
    rng = np.random.default_rng(2)
    lengths = rng.integers(2, 21, 16)
    places = np.arange(20)[None]
    for pad in (60, 1):
        ids = np.where(places < lengths[:, None] - 1, rng.integers(3, 60, (16, 20)), 60)
        ids = np.where(places < lengths[:, None], ids, pad).astype(np.int32)
        mask = places < lengths[:, None]
        ours = embedder.apply(params["towers"]["text"], {"ids": ids, "mask": mask}).pooled
        for theirs_mask in (torch.tensor(mask.astype(np.int64)), None):  # the causal mask hides padding already
            with torch.no_grad():
                out = model.get_text_features(torch.tensor(ids.astype(np.int64)), attention_mask=theirs_mask)
            assert difference(ours, getattr(out, "pooler_output", out).numpy()) < 1e-4


PHRASE = "a photo of the Red cat's  tail, résumé 中文 don't 1984 <|endoftext|>! \n\t it'll we've 🙂 naïve Straße ÀÉ"


def test_clip_tokenizers_give_the_same_ids(tmp_path):
    """A byte-level BPE as CLIP's, trained here and written by transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    shell = transformers.CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])._tokenizer
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer, raw.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    raw.train_from_iterator([PHRASE] * 3, trainer)
    made = json.loads(raw.to_str())["model"]
    vocabulary = made["vocab"]
    for token in (*(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in made["merges"]], model_max_length=12)
    theirs.save_pretrained(tmp_path)
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reread.pad_token_id == vocabulary["<|endoftext|>"] == len(vocabulary) - 1
    arch = ClipText(**{**TEXT, "vocab_size": len(vocabulary)}, pad_id=reread.pad_token_id, eos_id=reread.eos_token_id)
    texts = make_texts(Tower(arch=arch, max_length=12), tmp_path)
    rng = np.random.default_rng(0)
    strings = ["", " ", *(" ".join(rng.choice(PHRASE.split(" "), rng.integers(1, 30))) for _ in range(200))]
    for length in (12, 7):
        expected = reread(strings, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        column = texts.encode(strings, length=length)
        np.testing.assert_array_equal(column["ids"], expected["input_ids"])
        np.testing.assert_array_equal(column["mask"], expected["attention_mask"].astype(bool))
    assert load_tokenizer(tmp_path).get_vocab_size() == len(vocabulary)

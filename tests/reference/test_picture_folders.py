"""Folders of CLIPModel and SiglipModel as transformers writes them: read with their preprocessing, and started from."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from embedjax.config import ImageTower, Tower
from embedjax.data.image import Images
from embedjax.evaluate.encode import encode
from embedjax.load import load, resolve_tower
from embedjax.models import pictures

pytestmark = pytest.mark.reference


def photos():
    """Two real photos, 640 x 427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}, 64),
    "siglip": ("SiglipImageProcessorPil", {"size": {"height": 48, "width": 48}}, 48),
    "vit": ("ViTImageProcessorPil", {"size": {"height": 48, "width": 48}}, 48),
    "resnet": ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 56}}, 56),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_are_prepared_as_transformers_does(kind, tmp_path):
    import transformers

    name, options, size = PROCESSORS[kind]
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(tmp_path)
    pixels = pictures.read_pixels(tmp_path, size)
    ours = Images(size, pixels).encode(photos())["pixels"].astype(np.float32) / 255
    wanted = np.stack([np.asarray(x) for x in processor(photos(), return_tensors="np")["pixel_values"]]).transpose(0, 2, 3, 1)
    wanted = wanted * np.float32(pixels.std) + np.float32(pixels.mean)
    assert np.abs(ours - wanted).max() <= 1 / 255 + 1e-5
    # What we write gives the same processor again.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / pictures.PREPROCESSOR).write_text(json.dumps(pictures.pixels_to_hf(pixels, size, kind)))
    assert pictures.read_pixels(tmp_path / "again", size) == pixels


@pytest.fixture
def folder(tmp_path):
    """A CLIPModel of random weights with its processor and a tokenizer, as transformers saves them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    torch.manual_seed(0)
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    words.train_from_iterator(["a red bicycle on a street", "two cats asleep in the sun"] * 20, trainer)
    start, end = (words.token_to_id(token) for token in special)
    words.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], start), (special[1], end)]
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": 128,
        "max_position_embeddings": 16,
        "eos_token_id": end,
        "bos_token_id": start,
        "pad_token_id": end,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    path = tmp_path / "clip"
    transformers.CLIPModel(config).eval().save_pretrained(path)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=special[0], eos_token=special[1], pad_token=special[1], model_max_length=16
    ).save_pretrained(path)
    return path


def test_a_clip_folder_encodes_texts_and_pictures_as_transformers_does(folder, tmp_path):
    import torch
    import transformers

    texts = ["a red bicycle", "two cats asleep in the sun on a street"]
    model = load(folder)
    for n, photo in enumerate(photos()):
        photo.save(tmp_path / f"{n}.png")
    ours = [
        encode(model, texts, column="query"),
        encode(model, [str(tmp_path / f"{n}.png") for n in (0, 1)], column="document"),
    ]
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        out = theirs(**tokenizer(texts, padding=True, return_tensors="pt"), **processor(photos(), return_tensors="pt"))
    for found, wanted in zip(ours, (out.text_embeds, out.image_embeds), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_towers_start_from_a_folder_and_at_another_size(folder):
    image, text = resolve_tower(ImageTower(init=str(folder))), resolve_tower(Tower(init=str(folder)))
    assert isinstance(image, ImageTower) and image.arch is not None and image.width == text.width == 24
    larger = dataclasses.replace(image.arch, image=48)
    params = pictures.read_params(folder, "image", larger)
    assert params["encoder"]["positions"]["embedding"].shape == (1 + 36, 32)

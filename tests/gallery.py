"""Small models of pictures and texts with random parameters, in every form that a folder may have."""

import dataclasses

import jax
import numpy as np

from embedjax import config as c
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.load import Model, assemble, make_texts
from embedjax.models.embedder import build_embedder

SENTENCES = ["a red bicycle on a street", "two cats asleep in the sun", "the old house by a quiet river"]
PIXELS = c.Pixels(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
SQUASHED = c.Pixels(fit="squash", interpolation="bilinear")
TEXT = {"vocab_size": 96, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "positions": 12, "init_std": 0.2}
VIT = c.Vit(image=20, patch=4, width=24, depth=2, heads=2, mlp=40, init_std=0.2)
CLIP_VIT = dataclasses.replace(VIT, input_norm=True, patch_bias=False, activation="quick_gelu", norm_eps=1e-5)
PLAIN = (c.Dense(10, False, "identity"),)
WIDE = (c.Dense(24, True, "identity"),)


def image(arch=VIT, **more):
    """A resolved image tower."""
    whole = {"pixels": PIXELS, "dense": (), "normalize": True, "similarity": "cosine"} | more
    return c.ImageTower(arch, **whole)


def text(arch, **more):
    """A resolved tower of texts, shorter than its positions."""
    whole = {"pooling": "lasttoken", "dense": (), "normalize": True, "similarity": "cosine"} | more
    return c.Tower(arch, **{"max_length": 9, "prompts": {}, "include_prompt": True} | whole)


# The trained tokenizer pads with 0 and ends a text with 3; SigLIP's last place has neither start nor end.
CLIP_TEXT = text(c.ClipText(**TEXT, pad_id=0, eos_id=3), dense=PLAIN)
SIGLIP_TEXT = text(c.SiglipText(**TEXT, pad_id=0), dense=WIDE)
BERT = text(
    c.Bert(**TEXT), pooling="mean", dense=(c.Dense(10, True, "tanh"),), prompts={"query": "find: "}, include_prompt=False
)
SIGLIP_VIT = dataclasses.replace(VIT, pool="map", activation="gelu_tanh")
RESNET = c.Resnet(image=20, depths=(1, 1), channels=(8, 24), stem=8)
MODIFIED = c.ModifiedResnet(image=32, depths=(1, 1, 1, 1), channels=4, heads=4, features=10)
PAIRS = {
    "clip": (image(CLIP_VIT, dense=PLAIN), CLIP_TEXT),
    "siglip": (image(SIGLIP_VIT, pixels=SQUASHED), SIGLIP_TEXT),
    "bert": (image(dense=(c.Dense(10, False, "tanh"),)), BERT),
    "bert and clip": (image(dataclasses.replace(CLIP_VIT, positions="learned"), dense=PLAIN), BERT),
    "bert and map": (image(SIGLIP_VIT, dense=PLAIN), BERT),
    "bert and resnet": (image(RESNET, dense=PLAIN), BERT),
    "bert and mean": (image(dataclasses.replace(VIT, pool="mean", positions="sincos"), dense=PLAIN), BERT),
}


def tokenizer(folder):
    """A folder of a WordPiece tokenizer of the sentences, cut as the towers cut them."""
    save_tokenizer(train_wordpiece(SENTENCES * 5, 90), folder, max_length=9)
    return folder


def params_of(tower, seed):
    """Parameters with every leaf random, norms and biases too."""
    shapes = jax.eval_shape(build_embedder(tower).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    # Around what each starts from: scales of norms at 1, all else at 0.
    draw = lambda path, x: (path[-1].key in ("scale", "var")) + rng.normal(size=x.shape).astype(np.float32) * 0.2
    return jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(draw(path, x), np.float32), shapes)


def model(folder, image=None, text=None, loss=None) -> Model:
    """A model of one tower or two, its tokenizer in `folder`."""
    towers = {name: tower for name, tower in (("image", image), ("text", text)) if tower}
    columns = {"anchor": "text", "positive": "image"} if len(towers) > 1 else {}
    made = c.Model(towers, columns)
    params = {"towers": {name: params_of(tower, n) for n, (name, tower) in enumerate(towers.items())}}
    texts = {"text": make_texts(text, tokenizer(folder))} if text else {}
    details = {"loss": loss} if loss else {}
    return assemble(made, params, texts, dict.fromkeys(texts, folder), "gallery", details)

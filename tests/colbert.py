"""A small model of late interaction with random parameters, and a checkpoint of it as Stanford's ColBERT keeps it."""

import json
import string

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from embedjax import config as c
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.load import assemble, make_texts, resolve_tower
from embedjax.models.embedder import build_embedder
from embedjax.models.families import family_of
from embedjax.models.weights import to_tensors

ARCH = c.Bert(vocab_size=120, width=24, depth=2, heads=3, mlp=40, positions=40, init_std=0.2)
DENSE = (c.Dense(8, False, "identity"),)
LATE = c.Late("[unused0]", "[unused1]", query_length=12, document_length=24, attend=True)
SENTENCES = ["the red green fox, blue.", "a cat and a dog! (old) new? house", "sat on stone; river mat"]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat,", "river.", "stone!", "house", "(old)", "new?", "red-green", "fox;"]


def tokenizer(folder):
    """A folder of a WordPiece tokenizer of the sentences. Its vocabulary has Stanford's markers, and no other part of it knows
    them, and all punctuation, as BERT's has: PyLate skips unknown tokens with punctuation that it lacks."""
    made = json.loads(train_wordpiece(SENTENCES * 3, 80).to_str())
    vocabulary = made["model"]["vocab"]
    more = [token for token in ("[unused0]", "[unused1]", *string.punctuation) if token not in vocabulary]
    vocabulary |= {token: len(vocabulary) + n for n, token in enumerate(more)}
    save_tokenizer(Tokenizer.from_str(json.dumps(made)), folder, max_length=24)
    return folder


def model(place, late=LATE, dense=DENSE, prompts=None, seed=0, arch=ARCH):
    """A model of one tower; `place` is a folder for its tokenizer."""
    tower = resolve_tower(c.Tower(arch=arch, tokenizer=str(place), late=late, dense=dense, prompts=prompts or {}))
    params = jax.device_get(jax.jit(build_embedder(tower).init)(jax.random.key(seed)))
    texts = {"text": make_texts(tower, tokenizer(place))}
    return assemble(c.Model({"text": tower}), {"towers": {"text": params}}, texts, {"text": place}, "here")


def stanford(folder, made, **metadata):
    """The model as HF_ColBERT saves it, with the pooler that nobody reads."""
    folder.mkdir(exist_ok=True)
    params, late = made.params["towers"]["text"], made.config.towers["text"].late
    tensors = {f"bert.{name}": x for name, x in to_tensors(ARCH, params["encoder"]).items()}
    width = ARCH.width
    tensors |= {"bert.pooler.dense.weight": np.zeros((width, width), np.float32)}
    tensors |= {"bert.pooler.dense.bias": np.zeros(width, np.float32)}
    tensors["linear.weight"] = np.ascontiguousarray(params["dense"]["0"]["kernel"].T)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family_of(ARCH).to_hf(ARCH) | {"architectures": ["HF_ColBERT"]}))
    said = {"query_maxlen": late.query_length, "doc_maxlen": late.document_length, "dim": tensors["linear.weight"].shape[0]}
    said |= {"query_token_id": late.query_marker, "doc_token_id": late.document_marker, "nbits": 1, "interaction": "colbert"}
    said |= {"attend_to_mask_tokens": late.attend, "mask_punctuation": bool(late.skip), "similarity": "cosine"}
    (folder / "artifact.metadata").write_text(json.dumps(said | metadata))
    tokenizer(folder)
    return folder


def texts(count, most, seed=0):
    """Texts of two to `most` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, most))) for _ in range(count)]

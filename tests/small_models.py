"""Tiny random models of texts, one a family, with a tokenizer of their own: what programs are tried on."""

import gallery

from embedjax import config as c
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.load import Model, assemble, make_texts

SIZES = {"vocab_size": 64, "width": 24, "depth": 2, "heads": 3, "mlp": 40, "positions": 34, "init_std": 0.3}
ARCHS = {
    "bert": c.Bert(**SIZES),
    "bert of another activation": c.Bert(**SIZES, activation="gelu_tanh"),
    "roberta": c.Roberta(**SIZES, pad_id=0),
    "distilbert": c.DistilBert(**SIZES, activation="relu"),
    "mpnet": c.Mpnet(**SIZES, pad_id=1),
    "modernbert": c.ModernBert(**SIZES, pad_id=0, local_window=6),
    "static": c.Static(vocab_size=64, width=24, init_std=0.3),
}
PROMPTS = {"query": "red ", "document": ""}


def make(arch, folder, seed: int = 0, **changes) -> Model:
    """A model of one tower of texts of up to 24 tokens, its tokenizer kept in a folder."""
    save_tokenizer(train_wordpiece(["red cat", "blue dog", "old tree"] * 9, 60), folder, max_length=24)
    head = {"pooling": "mean", "dense": (), "normalize": True, "similarity": "cosine", "include_prompt": True}
    tower = c.Tower(arch=arch, **head | {"max_length": 24, "prompts": PROMPTS} | changes)
    one = lambda value: {"text": value}
    return assemble(
        c.Model(one(tower)),
        {"towers": one(gallery.params_of(tower, seed))},
        one(make_texts(tower, folder)),
        one(folder),
        "test",
    )

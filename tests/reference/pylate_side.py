"""What PyLate makes of a model and a batch, for `test_pylate.py`: run by the interpreter of an environment that has it.

PYTHON pylate_side.py make INIT FOLDER OPTIONS.json      a ColBERT model of an encoder, saved
PYTHON pylate_side.py read FOLDER BATCH.json OUT.npz     its vectors, scores, losses and gradients
"""

import json
import pathlib
import sys

import numpy as np
import torch
from pylate.losses import Contrastive, Distillation
from pylate.models import ColBERT
from pylate.scores import colbert_scores


def make(init: str, folder: str, options: str) -> None:
    torch.manual_seed(0)
    model = ColBERT(init, device="cpu", **json.loads(pathlib.Path(options).read_text()))
    model.save(folder, create_model_card=False)


def read(folder: str, batch: str, out: str) -> None:
    model, texts = ColBERT(folder, device="cpu"), json.loads(pathlib.Path(batch).read_text())
    model.eval()
    found: dict[str, np.ndarray] = {}
    vectors = {}
    for side in ("query", "document"):
        vectors[side] = model.encode(texts[side], is_query=side == "query", show_progress_bar=False)
        found[side] = np.concatenate(vectors[side])
        found[f"{side}_lengths"] = np.array([len(x) for x in vectors[side]])
    # Pooled: of each document the mean of each group, which is not of length 1.
    pooled = model.encode(texts["document"], is_query=False, pool_factor=2, protected_tokens=1, show_progress_bar=False)
    found |= {"pooled": np.concatenate(pooled), "pooled_lengths": np.array([len(x) for x in pooled])}
    # One pair at a time: of padded ones the padding, which PyLate gives the score 0, would win against negative similarities.
    whole = {side: [torch.as_tensor(x)[None] for x in each] for side, each in vectors.items()}
    found["scores"] = np.array([[colbert_scores(q, d).item() for d in whole["document"]] for q in whole["query"]])
    tokenized = lambda names, query: model.tokenize(names, is_query=query, pad=not query)
    columns = [tokenized(texts["query"], True), *(tokenized(column, False) for column in texts["columns"])]
    own = [columns[0], tokenized([text for row in zip(*texts["columns"], strict=True) for text in row], False)]
    teacher = torch.tensor(texts["scores"])
    losses = {
        "contrastive": lambda: Contrastive(model)(columns),
        "distillation": lambda: Distillation(model)(own, teacher),
        "distillation_raw": lambda: Distillation(model, normalize_scores=False)(own, teacher),
    }
    for name, loss in losses.items():
        model.zero_grad()
        value = loss()
        value.backward()
        found[name] = value.detach().numpy()
        found[f"{name}_dense"] = model[1].linear.weight.grad.numpy().T
        found[f"{name}_up"] = model[0].auto_model.encoder.layer[0].intermediate.dense.weight.grad.numpy().T
    np.savez(out, **found)


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](*sys.argv[2:])

"""Folders of classifiers against transformers: the logits of every family, pipelines, and a run that ends in one."""

import dataclasses
import json

import numpy as np
import pytest
import small_models

from embedjax import config as c
from embedjax.evaluate.encode import encode
from embedjax.export import export, gate
from embedjax.load import load, make_texts
from embedjax.models import sequence_classification as form
from embedjax.models.classifier import Head
from embedjax.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

SIZES = small_models.SIZES
ARCHS = {
    "BertForSequenceClassification": c.Bert(**SIZES),
    "RobertaForSequenceClassification": c.Roberta(**SIZES, pad_id=0),
    "XLMRobertaForSequenceClassification": c.Roberta(**SIZES, pad_id=0, model_type="xlm-roberta", activation="gelu_tanh"),
    "MPNetForSequenceClassification": c.Mpnet(**SIZES),
    "DistilBertForSequenceClassification": c.DistilBert(**SIZES),
}
TEXTS = ["red cat", "an old blue dog that is far longer than the longest text " * 3, "tree"]
LABELS = ("cats", "dogs", "trees")


def classifier(arch, folder, criterion="softmax", labels=LABELS):
    """A random model of an architecture, with a head "kinds"."""
    shape = {"pooling": "cls", "dense": form.dense_of(arch), "normalize": False, "prompts": {}}
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(arch.width, len(labels))), rng.normal(size=len(labels))
    head = Head(labels, False, criterion, kernel.astype(np.float32), bias.astype(np.float32))
    made = small_models.make(arch, folder, **shape)
    if arch.pad_id == 1:  # as MPNet's has it, whatever its config says: of that token no place is counted
        _pad_with_1(folder)
        made = dataclasses.replace(made, texts={"text": make_texts(made.config.towers["text"], folder)})
    return dataclasses.replace(made, heads={"kinds": head})


def _pad_with_1(folder):
    """Swaps the first two tokens of a WordPiece tokenizer, which are [PAD] and [UNK]."""
    file = folder / "tokenizer.json"
    told, swapped = json.loads(file.read_text()), {0: 1, 1: 0}
    told["model"]["vocab"] = {token: swapped.get(n, n) for token, n in told["model"]["vocab"].items()}
    for token in told["added_tokens"]:
        token["id"] = swapped.get(token["id"], token["id"])
    file.write_text(json.dumps(told))
    first, second, *rest = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([second, first, *rest]) + "\n")


def logits(folder, texts=TEXTS):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model, model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits.numpy()


@pytest.mark.parametrize("criterion", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ARCHS)
def test_transformers_gives_the_scores_of_the_model(name, criterion, tmp_path):
    made = classifier(ARCHS[name], tmp_path / "tokenizer", criterion)
    export(made, tmp_path / "model", "classifier")
    model, found = logits(tmp_path / "model")
    assert type(model).__name__ == name
    np.testing.assert_allclose(found, made.heads["kinds"].scores(encode(made, TEXTS)), atol=1e-5)
    assert model.config.num_labels == 3 and model.config.id2label == dict(enumerate(LABELS))
    told = gate.check(tmp_path / "model")
    assert told["embedjax"] < 1e-5 and told["transformers"] < 1e-5
    assert told["sentence-transformers"] == "does not read this format"


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_no_tensor_is_missing_or_left_over(name, tmp_path):
    export(classifier(ARCHS[name], tmp_path / "tokenizer"), tmp_path / "model", "classifier")
    auto = transformers.AutoModelForSequenceClassification
    _, told = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_what_transformers_saves_again_is_read_again(tmp_path):
    """Fine-tuned on elsewhere, a classifier of ours stays one; its encoder alone is one of anybody's."""
    made = classifier(ARCHS["RobertaForSequenceClassification"], tmp_path / "tokenizer")
    export(made, tmp_path / "model", "classifier")
    model, _ = logits(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    found = load(tmp_path / "tuned")
    np.testing.assert_allclose(found.heads["kinds"].scores(encode(found, TEXTS)), logits(tmp_path / "tuned")[1], atol=1e-5)
    transformers.AutoModel.from_pretrained(tmp_path / "tuned").save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    bare = load(tmp_path / "bare")
    assert bare.config.towers["text"].pooling == "mean" and not bare.heads


def test_a_classifier_of_others_is_read_as_its_encoder(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=34))
    model.save_pretrained(tmp_path / "model")
    small_models.make(ARCHS["BertForSequenceClassification"], tmp_path / "model")  # for its tokenizer
    found = load(tmp_path / "model")
    assert found.config.towers["text"].pooling == "mean" and not found.heads


@pytest.mark.parametrize(("criterion", "labels"), [("softmax", LABELS), ("sigmoid", LABELS), ("sigmoid", ("spam",))])
def test_the_pipeline_of_the_card(criterion, labels, tmp_path):
    made = classifier(ARCHS["BertForSequenceClassification"], tmp_path / "tokenizer", criterion, labels)
    export(made, tmp_path / "model", "classifier")
    classify = transformers.pipeline("text-classification", str(tmp_path / "model"), top_k=None, truncation=True, device="cpu")
    scores = made.heads["kinds"].scores(encode(made, TEXTS)).astype(np.float64)
    squash = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True) if criterion == "softmax" else 1 / (1 + np.exp(-x))
    for row, found in zip(squash(scores), classify(TEXTS), strict=True):
        told = {entry["label"]: entry["score"] for entry in found}
        np.testing.assert_allclose([told[label] for label in labels], row, atol=1e-5)


def test_a_run_ends_in_a_classifier(tmp_path):
    rows = [f"{noun} {n % 5}\t{label}" for n, (noun, label) in enumerate([("red cat", "cats"), ("old tree", "trees")] * 32)]
    (tmp_path / "kinds.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    tower = c.Tower(
        arch=c.Bert(**SIZES), tokenizer="wordpiece", max_length=8,
        pooling="cls", dense=(c.Dense(SIZES["width"]),), normalize=False,
    )  # fmt: skip
    columns = {"anchor": "text", "label": "label"}
    kinds = c.Set(c.File(str(tmp_path / "kinds.tsv")), columns, c.Classify(), name="kinds", labels=("cats", "trees"))
    config = c.Config(
        name="kinds", steps=30, model=c.Model({"text": tower}), data=c.Data(batch_size=16, sets=(kinds,)),
        optim=c.Optim(learning_rate=3e-3), export=c.Export("classifier"),
    )  # fmt: skip
    folder = train(config, tmp_path / "run").exported
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    model, found = logits(folder, ["red cat 1", "old tree 2"])
    assert [model.config.id2label[n] for n in found.argmax(1)] == ["cats", "trees"]
    assert gate.check(folder)["transformers"] < gate.TOLERANCE

"""The model card says what was trained on what, how and how well, in what the hub can read."""

import dataclasses
import re

import numpy as np
import yaml

from embedjax import config as c
from embedjax.export.card import card
from embedjax.load import Model

TOWER = c.Tower(
    arch=c.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16),
    pooling="mean", dense=(), normalize=True, similarity="cosine", max_length=8, prompts={}, include_prompt=True,
)  # fmt: skip


def bare(model, **details):
    return Model(model, {}, {}, {}, {}, "here", details)


def test_data_loss_hyper_parameters_and_scores():
    columns = {"anchor": "question", "positive": "answer"}
    pairs = c.Set(c.File("my/pairs.tsv"), columns, c.MultipleNegatives(scale=33.0), name="pairs")
    scored = c.Set(c.File("my/scored.tsv"), {**columns, "score": "s"}, c.CoSent(), name="scored")
    config = c.Config(
        seed=7, steps=10, model=c.Model({"text": TOWER}), data=c.Data(batch_size=48, sets=(pairs, scored)),
        optim=c.Optim(learning_rate=3e-4, schedule="cosine", warmup=0.25, weight_decay=0.05),
    )  # fmt: skip
    told = card(bare(config.model, config=config, step=6), "mine", {"sts/spearman": 0.81254, "pairs/ndcg@10": 0.5})
    training, rest = told.split("## Training\n")[1].split("## Citations\n")
    assert rest.count("* ") == 3, "MultipleNegatives, CoSent and Bert, each once"
    for words in ("Representation Learning with Contrastive", "CoSENT", "BERT"):
        assert words in rest
    commands, scores = rest.split("## Commands\n")[1].split("## Scores\n")
    for words in (
        "embedjax train run.py",
        "embedjax export mine --calibrate",
        "encode mine texts.txt codes.npy --precision int8",
    ):
        assert words in commands
    for name, file, loss in (("pairs", "my/pairs.tsv", "MultipleNegatives"), ("scored", "my/scored.tsv", "CoSent")):
        (data,) = re.findall(rf"^\* data `{name}`.*$", training, re.M)
        assert file in data and '"anchor": "question"' in data
        assert re.search(rf"^\* loss: {loss} ", training.split(data)[1].split("* data")[0], re.M)
    assert "'scale': 33.0" in training
    for words in ("steps: 6 of 10", "batch 48", "seed 7", "start: text: random weights"):
        assert words in training
    for words in ("learning_rate 0.0003", "schedule cosine", "warmup 0.25", "weight_decay 0.05"):
        assert words in training
    assert "| sts/spearman | 0.8125 |" in scores and "| pairs/ndcg@10 | 0.5000 |" in scores


def test_the_head_and_how_to_use_it():
    told = card(bare(c.Model({"text": TOWER})), "mine")
    _, front, text = told.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "sentence-transformers"
    assert "# mine\n" in text and "16 dimensions, of length 1" in text
    assert "Bert: 1 layers, width 16, 2 heads" in text and "8 tokens" in text
    assert "## Training" not in told and "## Scores" not in told and "## Prompts" not in told
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(code, "card", "exec")
    assert 'model.encode(["a text"' in code


def test_the_size_is_that_of_the_weights():
    model = c.Model({"text": TOWER})
    params = {"towers": {"text": {"encoder": {"w": np.zeros((500, 1000), np.float32), "b": np.zeros(24_000, np.float32)}}}}
    assert "| parameters | 0.5 million, 2 MB |" in card(Model(model, {}, params, {}, {}, "here"), "mine")
    assert "parameters" not in card(bare(model), "mine")


def test_late_interaction_has_its_own_codes():
    tower = dataclasses.replace(TOWER, late=c.Late(), dense=(c.Dense(8, False, "identity"),))
    told = card(bare(c.Model({"text": tower})), "mine", format="pylate")
    assert "embedjax encode mine texts.txt vectors.npy" in told and "--calibrate" not in told


def test_two_towers_are_asked_by_their_roles_and_prompts_are_listed():
    query = dataclasses.replace(TOWER, prompts={"query": "find: "}, normalize=False, similarity="dot")
    told = card(bare(c.Model({"query": query, "document": TOWER}, {"anchor": "query", "positive": "document"})), "mine")
    (code,) = re.findall(r"```python\n(.*?)```", told, re.S)
    assert "encode_query(" in code and "encode_document(" in code
    assert "| query tower | document tower |" in told and "| dot | cosine |" in told
    assert "| query | `find: ` |" in told and "of length 1 or not, by tower" in told

"""`embedjax evaluate`: which task the arguments make, and what they refuse."""

import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate.arguments import KINDS, parse


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        ("--task sts --data a.csv", c.Sts(c.File("a.csv"))),
        ("--task sts --data a.tsv --names x,y,z --columns a=x,b=y,score=z --dims 64,32 --limit 9",
         c.Sts(c.File("a.tsv", names=("x", "y", "z")), {"a": "x", "b": "y", "score": "z"}, dims=(64, 32), limit=9)),
        ("--task retrieval --data a.tsv", c.Retrieval(c.File("a.tsv"), {"query": "query", "document": "document"})),
        ("--task retrieval --data q.tsv --queries q.jsonl --corpus c.jsonl --prompt search",
         c.Retrieval(c.File("q.tsv"), {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"},
                     c.File("q.jsonl"), c.File("c.jsonl"), prompt="search")),
        ("--task retrieval --data q.tsv --queries q.jsonl --corpus c.jsonl --query-columns id=qid --corpus-columns text=body "
         "--skip-same-id",
         c.Retrieval(c.File("q.tsv"), {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"},
                     c.File("q.jsonl"), c.File("c.jsonl"), {"id": "qid", "text": "text"},
                     {"id": "_id", "title": "title", "text": "body"}, skip_same_id=True)),
        ("--task head --data a.csv --head kinds", c.HeadAccuracy(c.File("a.csv"), head="kinds")),
        ("--task knn --data a.csv --train b.csv --columns label=category --k 1",
         c.KnnClassification(c.File("a.csv"), {"text": "text", "label": "category"}, train=c.File("b.csv"), k=1)),
        ("--task classification --data a.csv --train b.csv --per-label 0",
         c.Classification(c.File("a.csv"), train=c.File("b.csv"), per_label=0)),
        ("--task pairs --data a.csv --positive entailment", c.PairClassification(c.File("a.csv"), positive="entailment")),
        ("--task bitext --data a.csv --columns source=deu,target=eng",
         c.BitextMining(c.File("a.csv"), {"source": "deu", "target": "eng"})),
    ],
)  # fmt: skip
def test_arguments_make_a_task(arguments, task):
    assert parse(["model", *arguments.split()]) == ("model", task)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--task stss --data a", "unknown task 'stss'; did you mean 'sts'?"),
        ("--task sts --data a --train b", "--train is for the task classification or knn, not for sts"),
        ("--task clustering --data a --per-label 3", "--per-label is for the task classification, not for clustering"),
        ("--task knn --data a", "name their file with --train"),
        ("--task retrieval --data a --corpus b", "--queries and --corpus go together"),
        ("--task retrieval --data a --corpus-columns id=b", "--corpus-columns is for a file of --queries and one of --corpus"),
        ("--task retrieval --data a --skip-same-id", "skip_same_id, but no corpus"),
        ("--task sts --data a --skip-same-id", "--skip-same-id is for the task retrieval, not for sts"),
        ("--task sts --data a --head b", "--head is for the task head, not for sts"),
        ("--task sts --data a --columns a:b", "--columns holds 'a:b'; it must be OURS=THEIRS"),
        ("--task retrieval --data a --queries b --corpus c --query-columns id", "--query-columns holds 'id'"),
        ("--task sts --data a --dims 64,x", "--dims holds 'x'"),
        ("--task sts --data a --dims 0", "each must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, reason):
    with pytest.raises(ConfigError) as error:
        parse(["model", *arguments.split()])
    assert reason in str(error.value)


def test_every_task_has_a_name_of_its_own():
    assert len(KINDS) == len(c.Task.__args__)

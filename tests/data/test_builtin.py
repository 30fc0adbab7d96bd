"""The embedded data set: which functions are taken, what is left of them, how they are split."""

import ast
import collections
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from embedjax.config import Functions
from embedjax.config.errors import DataError
from embedjax.data import builtin, functions
from embedjax.data.sources import manifest

VERBS = ["Open", "Close", "Read", "Write", "Count", "Merge", "Split", "Sort", "Draw", "Send"]
NOUNS = ["window", "socket", "table", "graph", "matrix", "packet", "record", "letter", "folder", "colour"]


def module(package, count, start=0):
    """Source of a module with `count` documented functions."""
    parts = []
    for i in range(start, start + count):
        verb, noun = VERBS[i % 10], NOUNS[i // 10 % 10]
        parts.append(
            f"def {verb.lower()}_{noun}_{i}(x):\n"
            f'    """{verb} the {noun} of the {package} {"again " * (i // 100)}at once.\n\n    More text.\n    """\n'
            f"    y = x + {i}\n    print({package!r}, y)\n    return y\n"
        )
    return "\n\n".join(parts)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def site(tmp_path):
    """Site-packages with twelve small packages, a large one, copies of packages, tests and broken files."""
    for i in range(12):
        write(tmp_path, {f"small{'abcdefghijkl'[i]}/part.py": module("small" + "abcdefghijkl"[i], 30)})
    write(
        tmp_path,
        {
            "large/__init__.py": module("large", 300),
            "large/_vendor/inner.py": module("vendored", 20),
            "large/third_party/inner.py": module("party", 20),
            "large/tests/test_it.py": module("tested", 20),
            "large/test_more.py": module("testmore", 20),
            "large/more_test.py": module("moretest", 20),
            "nested/site-packages/inner.py": module("hidden", 20),
            "broken/__init__.py": module("broken", 20) + "\ndef (:\n",
            "latin/__init__.py": "",
            "sparse.py": module("sparse", 1) + "x = 1\n" * 2000,
            "smalla/copy.py": module("smallb", 30),
            "large-1.2.dist-info/RECORD": "large/__init__.py,,\nlarge/x.py,,\n",
            "large-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: large\nVersion: 1.2\n",
        },
    )
    (tmp_path / "latin" / "__init__.py").write_bytes(module("latin", 20).encode() + b"# \xe9\n")
    return tmp_path


def test_functions_of_the_chosen_packages_only(site):
    split = builtin.extract([site], 0)
    found = {row.package for rows in split.values() for row in rows}
    assert found == {"large", *(f"small{letter}" for letter in "abcdefghijkl")}
    text = " ".join(row.summary for rows in split.values() for row in rows)
    for absent in ("vendored", "party", "tested", "testmore", "moretest", "hidden", "broken", "latin", "sparse"):
        assert absent not in text


def test_no_summary_or_code_twice(site):
    rows = [row for rows in builtin.extract([site], 0).values() for row in rows]
    assert len(rows) == 300 + 12 * 30
    assert len({row.summary.lower() for row in rows}) == len(rows)
    assert len({"".join(row.code.split()) for row in rows}) == len(rows)


def test_split_is_by_package(site):
    split = builtin.extract([site], 0)
    train, test = ({row.package for row in split[name]} for name in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(split["test"]) >= builtin.TEST_SHARE * 660
    assert len(split["test"]) <= 0.2 * 660
    assert len(test) > 1


def test_rows_are_the_same_again_and_in_another_order_for_another_seed(site, tmp_path):
    assert builtin.extract([site], 3) == builtin.extract([site], 3)
    first, second = (builtin.extract([site], seed)["train"] for seed in (3, 4))
    assert first != second
    key = lambda row: (row.package, row.line)
    assert {row.code for row in first if row.package == "large"} == {row.code for row in second if row.package == "large"}
    assert sorted(map(key, first)) != list(map(key, first))


@pytest.mark.parametrize("limit", [0, 10, 57, 200])
def test_no_package_has_more_than_its_share(site, limit):
    train = builtin.extract([site], 0)["train"]
    rows = builtin._capped(train, limit)
    counts = collections.Counter(row.package for row in rows)
    assert len(rows) == limit or (limit in (0, 200) and len(rows) > 100)
    assert max(counts.values()) <= len(rows) / builtin.SHARE
    order = {row: i for i, row in enumerate(train)}
    assert [order[row] for row in rows] == sorted(order[row] for row in rows)


def test_a_limit_larger_than_the_rows_and_too_few_packages():
    row = lambda i, package: builtin.Function(f"Does {i}", f"def f{i}", "f", package, "f.py", i)
    rows = [row(i, f"p{i % 10}") for i in range(40)]
    assert builtin._capped(rows, 1000) == rows
    assert len(builtin._capped([row(i, "only") for i in range(40)], 0)) == 1


CASES = '''
import abc


class Thing:
    """A thing."""

    @property
    @functools.cache
    def area(self, scale=1):
        r"""Compute the area of it. And more
        of the text.

        Args:
          scale: factor
        """
        # Compute the area of it.
        value = self.a * self.b
\x0c
        text = """
not indented
"""
        return value * scale

    async def fetch(self):
        """
        Fetch all rows from
        the server
        """
        await self.go()
        return 1

    def short(self):
        """Give the short answer here."""
        return 1

    def shared(self): """Share one line with it."""; a = 1; b = 2; return a

    def twice(
        self,
        a,
    ):
        """Look at this one twice.
        """; a = 1
        b = 2
        return a

    def todo(
        self,
        a,
    ):
        """Do something in a subclass."""
        raise NotImplementedError("later")

    def brief(self):
        """Two words."""
        a = 1
        b = 2
        return a + b

    def undocumented(self):
        a = 1
        b = 2
        return a + b


def outer():
    """Return an inner function of it."""
    def inner():
        """Be not found at all."""
        a = 1
        b = 2
        return a
    return inner
'''


def test_code_without_docstring_and_decorators():
    found = {name: (line, summary, code) for name, line, summary, code in functions.functions_of(CASES)}
    assert set(found) == {"area", "fetch", "outer"}
    line, summary, code = found["area"]
    assert summary == "Compute the area of it."
    assert CASES.split("\n")[line - 1].strip() == "def area(self, scale=1):"
    assert code == (
        "def area(self, scale=1):\n    # Compute the area of it.\n    value = self.a * self.b\n\x0c\n"
        '    text = """\nnot indented\n"""\n    return value * scale'
    )
    assert found["fetch"][1:] == ("Fetch all rows from the server", "async def fetch(self):\n    await self.go()\n    return 1")
    assert found["outer"][2].startswith("def outer():\n    def inner():")


def test_windows_line_ends_and_marks():
    plain = module("x", 3)
    assert list(functions.functions_of(plain.replace("\n", "\r\n"))) == list(functions.functions_of(plain))
    assert len(list(functions.functions_of(plain))) == 3


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the sum of both. It is fast.", "Return the sum of both."),
        ("Return e.g. the sum of\nboth numbers.\n\nMore.", "Return e.g. the sum of both numbers."),
        ("\n    Return the sum now\n    Args:\n      a: one", "Return the sum now"),
        ("Return the sum now\n:param a: one", "Return the sum now"),
        ("Return the sum now\n>>> f(1)\n1", "Return the sum now"),
        ("Sum it.", None),
        ("f(a, b) -> sum of both", None),
        ("name (`str`): The name of it.", None),
        ("See base class for details.", None),
        ("返回 两个 数字 的 和 sum of two numbers", None),
        ("--- === 1 2 3 4 5 6 7 8 9 a b c d e f", None),
        ("Return the \x00 sum of both", None),
        ("", None),
    ],
)
def test_summary(docstring, summary):
    assert functions.summary_of(docstring) == summary


def test_children_find_the_same_as_one_process(site, monkeypatch):
    paths = [str(path) for path in sorted(site.rglob("*.py"))] * 10
    assert len(paths) > 200
    alone = functions._read(paths)
    monkeypatch.setattr(functions.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert json.loads(json.dumps(alone)) == [[list(f) for f in found] for found in functions.read_all(paths)]
    # a child that cannot start costs time, not rows
    monkeypatch.setattr(functions.sys, "executable", str(site / "missing"))
    assert functions.read_all(paths) == alone


@pytest.fixture
def opened(site, monkeypatch):
    monkeypatch.setattr(builtin, "installed_roots", lambda: (str(site),))
    monkeypatch.setattr(builtin, "FEWEST", 100)
    builtin._installed.cache_clear()
    yield lambda **fields: builtin.open_functions(Functions(**fields))
    builtin._installed.cache_clear()


def test_source(opened, site):
    source = opened(split="train")
    assert source.columns == ("summary", "code", "name", "package")
    assert source.name == "functions/train"
    row = source[0]
    assert set(row) == set(source.columns)
    file, line = source.where(0)
    assert f"def {row['name']}(" in Path(file).read_text().split("\n")[line - 1]
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]
    listed = {entry["file"]: entry for entry in manifest(source)}
    assert "large (large 1.2)" in listed
    assert sum(entry["rows"] for entry in listed.values()) == len(source)
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in listed.values())
    assert len(opened(split="train", limit=10)) == 10
    assert {row.package for row in opened(split="test").rows}.isdisjoint(row.package for row in source.rows)


def test_the_packages_are_read_once(opened, monkeypatch):
    train = opened(split="train")
    monkeypatch.setattr(builtin, "extract", None)
    assert 0 < len(opened(split="test")) < len(train)


def test_too_few_functions(opened, monkeypatch):
    monkeypatch.setattr(builtin, "FEWEST", 10_000)
    with pytest.raises(DataError, match=r"have 660 documented functions; .* at least 10000"):
        opened()


def test_nothing_is_run(tmp_path):
    write(tmp_path, {"mean/__init__.py": f"raise SystemExit(open({str(tmp_path / 'ran')!r}, 'w'))\n" + module("mean", 20)})
    assert sum(map(len, builtin.extract([tmp_path], 0).values())) == 20
    assert not (tmp_path / "ran").exists()


def test_this_interpreter(monkeypatch):
    """A small share of the real packages."""
    monkeypatch.setattr(builtin, "TOTAL_BYTES", 3 << 20)
    split = builtin.extract(builtin.installed_roots(), 0)
    rows = [*split["train"], *split["test"]]
    assert len(rows) > 400
    assert len(split["test"]) > 0.05 * len(rows)
    for row in rows[:200]:
        node = ast.parse(textwrap.dedent(row.code)).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert node.name == row.name
        assert not node.decorator_list
        assert ast.get_docstring(node) is None
        assert not {"_vendor", "tests", "third_party"} & set(row.file.split("/"))


def test_import_needs_no_jax():
    script = "import sys; import embedjax.data.builtin; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

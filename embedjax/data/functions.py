"""The text of a Python module -> its documented functions as (name, line, summary, code), without running any of it.

Many modules are shared among a few processes. Which files are read and which functions are kept is up to builtin.py.
"""

import ast
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECTION = re.compile(
    r"\s*(>>>|:\w+[^:]*:|@\w+|\.\. |[-=~*]{3,}|(Args?|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?)\s*:)"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")
WORD = re.compile(r"[A-Za-z]{2,}")
# A signature or a parameter's description, or a summary that says nothing of the function itself.
EMPTY_WORDS = re.compile(r"[\w.]+ ?\(|(see|same as|deprecated|overrides?|overridden|inherited|todo)\b", re.IGNORECASE)

Found = tuple[str, int, str, str]  # name, line, summary, code
CODE_CHARS = 16_000


def read_all(paths: Sequence[str]) -> list[list[Found]]:
    """`_read` of each path, shared among a few processes.

    They are plain child processes and not `multiprocessing`, whose children would import the user's script again.
    """
    count = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    count = max(1, min(count, len(paths) // 100))
    parts = [list(paths[part::count]) for part in range(count)]
    command = [sys.executable, "-c", "from embedjax.data import functions; functions.serve()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}

    def child(part: list[str]) -> list[list[Found]] | None:
        try:
            done = subprocess.run(command, input=json.dumps(part).encode(), env=environment, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return json.loads(done.stdout)

    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(child, part) for part in parts[1:]]
        found: list[list[Found]] = [[] for _ in paths]
        found[::count] = _read(parts[0])
        for part, answer in enumerate(answers, start=1):
            done = answer.result()
            found[part::count] = _read(parts[part]) if done is None else done
    return found


def serve() -> None:
    """The child of `read_all`: paths on its input, what they hold on its output, both JSON."""
    json.dump(_read(json.load(sys.stdin)), sys.stdout)


def _read(paths: Sequence[str]) -> list[list[Found]]:
    found = []
    collecting = gc.isenabled()
    gc.disable()  # trees of a million nodes: the collector would double the time and find nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own invalid escapes
            for path in paths:
                try:
                    text = Path(path).read_bytes().decode("utf-8-sig")
                except (OSError, UnicodeDecodeError):
                    text = ""
                found.append(list(functions_of(text)))
    finally:
        if collecting:
            gc.enable()
    return found


def functions_of(text: str) -> Iterator[Found]:
    """(name, line, summary, code) of the documented functions and methods of a module; none if it does not parse."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.split("\n")  # as ast counts them: form feeds do not end a line
    scopes: list[ast.Module | ast.ClassDef] = [module]
    while scopes:
        scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                summary = summary_of(docstring) if docstring else None
                code = _code(node, lines) if summary else None
                if summary and code:
                    yield node.name, node.lineno, summary, code


def summary_of(docstring: str) -> str | None:
    """The first sentence of a docstring; None if it is not at least three words of plain English."""
    paragraph: list[str] = []
    for line in docstring[:2000].strip().split("\n"):
        if not line.strip() or SECTION.match(line):
            break
        paragraph.append(line)
    summary = SENTENCE.split(" ".join(" ".join(paragraph).split()))[0]
    words = WORD.findall(summary)
    if len(words) < 3 or len(summary) > 300 or not summary.isprintable() or EMPTY_WORDS.match(summary):
        return None
    plain = sum(character.isascii() for character in summary)
    return summary if plain >= 0.95 * len(summary) and sum(map(len, words)) >= 0.5 * len(summary) else None


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str | None:
    """Source of a function from `def` on, without decorators and docstring, dedented; None if too little is left."""
    docstring, rest = node.body[0], node.body[1:]
    if not rest or (len(rest) == 1 and _trivial(rest[0])):
        return None
    first, last = docstring.lineno, docstring.end_lineno or docstring.lineno
    if lines[first - 1][: docstring.col_offset].strip() or rest[0].lineno <= last:
        return None  # the docstring shares its lines with code
    kept = [*lines[node.lineno - 1 : first - 1], *lines[last : node.end_lineno]]
    indent = lines[node.lineno - 1][: node.col_offset]
    # Not textwrap.dedent: a string whose lines start at the margin would keep the whole function indented.
    code = "\n".join(line.removeprefix(indent) for line in kept)
    if sum(1 for line in kept if line.strip()) < 3 or len(code) > CODE_CHARS:
        return None
    return code


def _trivial(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False

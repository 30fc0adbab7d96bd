"""The words of a command line -> a dataclass or the arguments of a function, by tyro, whose errors become one line each."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from embedjax.config.errors import ConfigError
from embedjax.config.serialize import NAMES

FLAG, EMPTY, WORDS = object(), object(), ""
"""Instead of a type: an option without a value, a field that holds nothing whose fields could be set. WORDS, instead of an
option, stands for words that follow none."""


def parse(kind: Any, arguments: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """What tyro makes of the words. Raises ConfigError that names the option, what was found and what was expected."""
    given = {} if default is None else {"default": default}
    with one_line(arguments, lambda: options(kind, default)):
        return tyro.cli(kind, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,), **given)


@contextlib.contextmanager
def one_line(arguments: Sequence[str] = (), known: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """Makes a ConfigError of what ends a call of tyro: by the options, where they are known, else of its text."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(_problem(arguments, known()) or _flat(said.getvalue())) from None
    sys.stderr.write(said.getvalue())


def options(kind: Any, default: Any = None) -> dict[str, Any]:
    """Option -> type, FLAG or EMPTY, by the names tyro gives to the arguments of a function or the fields of `default`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    made = _defaults(kind) if default is None else {}
    value = lambda name: made.get(name) if default is None else getattr(default, name, None)
    names = inspect.signature(kind).parameters
    return {option: found for name in names for option, found in _options(value(name), hints[name], name)}


def _defaults(kind: Any) -> dict[str, Any]:
    """Field of a dataclass -> what it is by default, where that is made anew each time; {} of a function."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: field.default_factory() for field in fields if callable(field.default_factory)}


def _options(value: Any, hint: Any, name: str) -> Iterator[tuple[str, Any]]:
    if typing.get_origin(hint) is typing.Annotated:
        hint, *marks = typing.get_args(hint)
        if all(mark in marks for mark in typing.get_args(tyro.conf.Positional[str])[1:]):
            yield WORDS, hint
            return
        name = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), name)
    below = f"{name}." if name else ""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            yield from _options(getattr(value, field.name), hints[field.name], f"{below}{field.name}")
    elif isinstance(value, dict) and value and typing.get_origin(hint) is dict:
        for key, item in value.items():
            yield from _options(item, typing.get_args(hint)[1], f"{below}{key}")
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        for i, item in enumerate(value):
            yield from _options(item, hint, f"{below}{i}")
    else:
        option = "--" + name.replace("_", "-")
        found = EMPTY if _holds_fields(hint) else FLAG if hint is bool else hint
        yield option, found
        if found is FLAG:
            yield _negated(option), FLAG


def _holds_fields(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(map(_holds_fields, typing.get_args(hint)))


def _negated(option: str) -> str:
    above, dot, name = option[2:].rpartition(".")
    return f"--{above}{dot}no-{name}"


def _problem(arguments: Sequence[str], known: Mapping[str, Any]) -> str:
    """What is wrong with the first option that is wrong; nothing where only tyro could tell."""
    for name, words in _grouped(arguments) if known else ():
        option = name.replace("_", "-")
        kind = known.get(option, EMPTY)
        if name == WORDS:
            if words and WORDS not in known:
                return f"{words[0]!r} follows no option; options begin with --, and --help lists them"
        elif kind is EMPTY:
            return _unknown(name, option, known)
        elif kind is FLAG:
            if words and WORDS not in known:
                shown = option if _negated(option) in known else option.replace("no-", "", 1)
                return f"{name} is {_quoted(words)}; it takes no value: give {shown} or {_negated(shown)}"
        elif not _fits(words[:1] if WORDS in known else words, kind):
            return f"{name} {f'is {_quoted(words)}' if words else 'has no value'}; {_expected(kind)} was expected"
    return ""


def _grouped(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(option, the words after it), those before the first option under WORDS. A number below 0 is no option."""
    groups: list[tuple[str, list[str]]] = [(WORDS, [])]
    for word in arguments:
        if re.match(r"--?[a-zA-Z]", word):
            name, sign, value = word.partition("=")
            groups.append((name, [value] if sign else []))
        else:
            groups[-1][1].append(word)
    return groups


def _unknown(name: str, option: str, known: Mapping[str, Any]) -> str:
    for above, kind in known.items():
        if kind is EMPTY and f"{option}.".startswith(f"{above}."):
            return f"{name} cannot be set here: {above[2:]} is empty in the config file, and is filled there"
    close = difflib.get_close_matches(option, [other for other, kind in known.items() if kind is not EMPTY], n=1)
    return f"there is no option {name}; {f'did you mean {close[0]!r}?' if close else '--help lists them'}"


def _fits(words: Sequence[str], kind: Any) -> bool:
    """Whether the words are a value of this type, as tyro reads them."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(words, member) for member in inner)
    if origin is dict or (origin is tuple and inner[-1] is Ellipsis):
        kinds = inner if origin is dict else _members(inner[0])
        return len(words) % len(kinds) == 0 and all(_fits([word], kinds[i % len(kinds)]) for i, word in enumerate(words))
    if len(words) != 1:
        return False
    if origin is typing.Literal:
        return words[0] in map(str, inner)
    if kind in (bool, type(None)):
        return words[0] in (("True", "False") if kind is bool else ("None",))
    try:
        kind(words[0])
    except ValueError:
        return False
    return True


def _members(kind: Any) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)


def _expected(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_expected, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is dict:
        return "any number of keys and values"
    if origin is tuple:
        return f"any number of times {' and '.join(map(_expected, _members(inner[0])))}"
    return {bool: "True or False", type(None): "None", Path: "a path"}.get(kind) or NAMES[kind]


def _quoted(words: Sequence[str]) -> str:
    return " ".join(map(repr, words))


def _flat(box: str) -> str:
    """tyro's text without its frame, its title and the pointer to --help."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    parts = re.split(r"\n?─{3,}\n?", "\n".join(lines))
    return "; ".join(" ".join(part.split()) for part in parts if not part.startswith("For full helptext")) or box

"""When the command restarts itself, and with which variables."""

from pathlib import Path

import pytest

from embedjax import allocator


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, True),
        ({"LD_PRELOAD": "/lib/libsomething.so"}, True),
        ({allocator.GUARD: "libtcmalloc.so.4"}, False),
        ({"LD_PRELOAD": "/lib/libjemalloc.so.2"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
    ],
)
def test_it_restarts_once_and_respects_a_choice(variables, wanted, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    assert allocator.wanted(variables) is wanted
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.wanted(variables) is False


def test_tcmalloc_is_found_before_jemalloc(tmp_path):
    assert allocator.find((str(tmp_path),)) is None or allocator.find((str(tmp_path),)).parent != tmp_path
    for name in ("libjemalloc.so.2", "libtcmalloc_minimal.so.4"):
        (tmp_path / name).touch()
        assert allocator.find((str(tmp_path),)) == tmp_path / name


def test_the_environment_of_each_choice(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/lib/libmine.so")
    found = allocator.environment(Path("/lib/libjemalloc.so.2"))
    assert found["LD_PRELOAD"] == "/lib/libjemalloc.so.2 /lib/libmine.so" and "dirty_decay_ms:-1" in found["MALLOC_CONF"]
    assert "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD" in allocator.environment(Path("/lib/libtcmalloc.so.4"))
    assert allocator.environment(None)["GLIBC_TUNABLES"] == allocator.GLIBC
    for library in (None, Path("/lib/libtcmalloc.so.4")):
        assert not allocator.wanted(allocator.environment(library))  # the guard: it never restarts twice


def test_restart_keeps_the_command(monkeypatch):
    called = []
    monkeypatch.setattr(allocator, "wanted", lambda variables: True)
    monkeypatch.setattr(allocator.os, "execve", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(allocator.sys, "orig_argv", ["python", "-X", "dev", "bin/embedjax", "train", "x.py"])
    allocator.restart()
    ((program, arguments, variables),) = called
    assert arguments == [program, "-X", "dev", "bin/embedjax", "train", "x.py"] and allocator.GUARD in variables

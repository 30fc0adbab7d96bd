"""`embedjax train --dry-run`: what a config means, before anything is trained."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from embedjax import build
from embedjax.config import Config, serialize

MIB = 2**20


def preview(config: Config) -> Iterator[str]:
    """Lines: the resolved config, the mesh, the shapes and memory of each step, three decoded rows. Writes no run folder."""
    with tempfile.TemporaryDirectory(prefix="embedjax-") as name:
        run = build.build(build.resolve(config), Path(name))
        yield json.dumps(serialize.to_json(run.config), indent=1)
        yield build.summary(run)
        state = sum(_bytes(x) for x in jax.tree.leaves(run.abstract))
        yield f"state: {state / MIB:.1f} MiB in all, split as the mesh says"
        for shape, compiled in build.compiled(run):
            found = compiled.memory_analysis()
            if found is None:
                yield f"step [{shape}]: memory is not known on this platform"
                continue
            kept, extra = found.argument_size_in_bytes, found.temp_size_in_bytes
            yield f"step [{shape}]: per device {kept / MIB:.1f} MiB of state and batch, {extra / MIB:.1f} MiB while it runs"
        for number, row in enumerate(run.batches.decoded(0, 3)):
            for column, (text, tokens) in row.items():
                yield f"row {number} {column}: {_short(text)}\n      tokens: {_short(tokens)}"


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def _short(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."

"""Texts or pictures -> vectors on the mesh: tokens sorted by length into a few compiled shapes, dispatched ahead of the device.

Reads and writes no files (`files.py` does) and knows nothing of what the vectors are for.
"""

import collections
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jaxtyping import Float, Int
from PIL import Image

from embedjax import config, sharding
from embedjax.config.errors import ConfigError, DataError, NonFiniteError, nearest
from embedjax.config.model import TEXTS
from embedjax.evaluate.pictures import decoded
from embedjax.load import Model, make_images, plain_params
from embedjax.models.embedder import Embedder
from embedjax.models.image import ImageEmbedder

Columns = dict[str, np.ndarray]
T = TypeVar("T")

# What an input may be to a model: a text or picture on its own, a query or document, or one of a training column.
COLUMNS = ("text", "image", *config.ROLES, *TEXTS)

# Tokens of a device's batch. A CPU's caches want it small, an accelerator's matrix units large.
TOKENS_PER_BATCH = {"cpu": 2048}
TOKENS_PER_BATCH_ACCELERATOR = 65536
# Batches whose results are not fetched yet: enough to keep the device busy, few enough to bound memory.
IN_FLIGHT = 4
# Numbers of a block of padded token ids on the host.
BLOCK_TOKENS = 1 << 22
# Pixels of a block of pictures on the host, and the threads that decode them: Pillow lets go of Python's lock. Each may hold a
# picture of 75 MB, the largest that is decoded.
BLOCK_PIXELS = 1 << 24
DECODERS = min(16, max(4, os.cpu_count() or 1))


def encode(
    model: Model,
    texts: Sequence[Any],
    *,
    column: str = "text",
    prompt: str | None = None,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "N E"]:
    """One vector a text, in the texts' order, float32; or a picture, where the column's tower takes those (`encode_images`).

    `column` is "query" or "document" for the two sides of a search, each with its tower and its prompt where the model has
    such. A "text" on its own, or of a training column such as "anchor", has the default prompt alone, as in
    sentence-transformers' `encode`; of two towers that of its side. Of a tower of texts and one of pictures "text" and "image"
    mean either. `prompt` names another of the tower's prompts; `task` a prompt (NAME-query or NAME-document for its side, else
    NAME), an adapter or both of a name. `tokens_per_batch` is meant for each device, `progress(done, total)` is called as rows
    arrive. Without a mesh the rows follow the parameters: over the mesh they are on, else on one device.
    Raises ConfigError for an unknown column, prompt or task, NonFiniteError for a vector that is not finite.
    """
    if isinstance(texts, str | bytes | os.PathLike):
        raise ConfigError("encode takes a list of texts or pictures, not one; write [text]")
    encoder = encoder_of(model, column=column, prompt=prompt, task=task, mesh=mesh, tokens_per_batch=tokens_per_batch)
    starts = range(0, len(texts), encoder.block)
    blocks = (encoder.tokenize(texts[start : start + encoder.block]) for start in starts)
    out = np.empty((len(texts), encoder.width), np.float32)
    report = (lambda done: progress(done, len(texts))) if progress else None
    for start, vectors in zip(starts, encoder.stream(blocks, progress=report), strict=True):
        out[start : start + len(vectors)] = vectors
    return out


def encode_images(
    model: Model,
    pictures: Sequence[Any],
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "N E"]:
    """One vector a picture, in their order, float32. Pictures are paths, the bytes of JPEG, PNG, WebP, GIF or BMP files,
    Hugging Face's {"bytes", "path"}, or Pillow's; each is cut and scaled as the model's folder says, in threads.

    `task` names an adapter. Raises DataError for a picture that is damaged or above 25 million pixels, ConfigError for a model
    without an image tower.
    """
    return encode(model, pictures, column="image", task=task, mesh=mesh, progress=progress)


class Encoder:
    """One tower of a model on a mesh, for any number of blocks of texts."""

    late = False  # whether it gives vectors of tokens

    def __init__(
        self,
        model: Model,
        *,
        column: str = "text",
        prompt: str | None = None,
        task: str | None = None,
        mesh: DeviceMesh | None = None,
        tokens_per_batch: int | None = None,
    ):
        self.prompt, adapter = asked(model.config, column, prompt, task)
        tower, self.column = model.config.tower_of(column), column
        if model.config.is_late(tower) != self.late:
            kinds = "a vector a text", "a vector a token, by late interaction"
            raise ConfigError(
                f"{model.origin} gives {kinds[not self.late]}; here {kinds[self.late]} is asked for. Late interaction is for "
                "embedjax encode and search, for evaluate's retrieval, reranking, pairs, triplets and sts, and for "
                "encode_tokens in Python"
            )
        params = plain_params(model, tower, adapter)
        self.mesh = mesh or mesh_of(params)
        self.params = jax.tree.map(lambda leaf: _on(self.mesh, leaf), params)
        self.width = model.embedders[tower].width
        self.forward = _forward(model.embedders[tower], self.mesh)
        platform = self.mesh.devices.flat[0].platform
        self.tokens = tokens_per_batch or TOKENS_PER_BATCH.get(platform, TOKENS_PER_BATCH_ACCELERATOR)
        self._reads(model, tower)

    def _reads(self, model: Model, tower: str) -> None:
        self.texts = model.texts[tower]
        assert self.texts.pad_side == "right", "batches are cut from the left end of a block"
        self.block = int(np.clip(BLOCK_TOKENS // self.texts.max_length, 256, 16384))

    @property
    def identity(self) -> tuple:
        """What decides the columns of a text, cheap enough to compare each time."""
        texts = self.texts
        said = (texts.max_length, tuple(sorted(texts.prompts.items())), texts.default_prompt, texts.include_prompt)
        return (self.prompt, *said, hash(texts.tokenizer.to_str()))

    def tokenize(self, texts: Sequence[str]) -> Columns:
        """At most `block` texts as padded arrays `[N L]`."""
        return self.texts.encode(texts, prompt=self.prompt)

    def _batches(self, columns: Columns) -> Iterator[tuple[np.ndarray, Columns]]:
        """(row numbers, the batch that begins with these rows)."""
        yield from self._cut(columns, columns["mask"].sum(1))

    def _cut(self, columns: Columns, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Columns]]:
        for rows, shape in plan(lengths, self.texts.max_length, self.tokens, self.mesh.size):
            yield rows, _padded(columns, rows, shape)

    def embed(self, columns: Columns, advance: Callable[[int], None] = lambda rows: None) -> Float[np.ndarray, "N E"]:
        """Vectors of a tokenized block; `advance(rows)` is called as rows arrive. Raises NonFiniteError."""
        out = np.empty((len(next(iter(columns.values()))), self.width), np.float32)
        pending: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

        def fetch() -> None:
            rows, vectors = pending.popleft()
            out[rows] = np.asarray(vectors)[: len(rows)]
            if not np.isfinite(out[rows]).all():
                raise NonFiniteError("the model gives vectors that are not finite; its weights hold NaN, or overflow")
            advance(len(rows))

        for rows, batch in self._batches(columns):
            pending.append((rows, self.forward(self.params, self._place(batch))))
            if len(pending) > IN_FLIGHT:
                fetch()
        while pending:
            fetch()
        return out

    def stream(
        self, blocks: Iterable[Columns], *, progress: Callable[[int], None] | None = None
    ) -> Iterator[Float[np.ndarray, "N E"]]:
        """Vectors of each block, in order; the next block is made (tokenized) while the device works on this one."""
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress:
                progress(done)

        for columns in ahead(blocks):
            yield self.embed(columns, advance)

    def _place(self, columns: Columns) -> dict[str, jax.Array]:
        rows = sharding.rows(self.mesh)
        return {name: jax.make_array_from_callback(x.shape, rows, lambda at, x=x: x[at]) for name, x in columns.items()}


class PictureEncoder(Encoder):
    """An image tower of a model on a mesh, for any number of blocks of pictures."""

    def _reads(self, model: Model, tower: str) -> None:
        found = model.config.towers[tower]
        assert isinstance(found, config.ImageTower) and found.arch is not None
        self.images = make_images(found)
        self.rows = max(1, self.tokens // found.arch.tokens)
        self.block = int(np.clip(BLOCK_PIXELS // found.arch.image**2, 16, 4096))

    @property
    def identity(self) -> tuple:
        """What decides the pixels of a picture."""
        return (self.images.size, self.images.pixels)

    def tokenize(self, texts: Sequence[Any], bad: dict[int, str] | None = None) -> Columns:
        """At most `block` pictures as pixels `[N S S 3]`, decoded in threads, each of which holds one. Raises DataError for a
        picture that cannot be decoded; or, with `bad`, notes there which and why, and leaves it black."""

        def square(at: int) -> np.ndarray:
            try:
                return self.images.encode([_decoded(texts[at])])["pixels"]
            except DataError as error:
                if bad is None:
                    raise
                bad[at] = str(error)
                return np.zeros((1, self.images.size, self.images.size, 3), np.uint8)

        with ThreadPoolExecutor(DECODERS) as pool:
            return {"pixels": np.concatenate([*pool.map(square, range(len(texts))), self.images.encode([])["pixels"]])}

    def _batches(self, columns: Columns) -> Iterator[tuple[np.ndarray, Columns]]:
        pixels, each = columns["pixels"], self.rows
        while each > 1 and len(pixels) <= each // 2 * self.mesh.size:
            each //= 2
        size = each * self.mesh.size
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            missing = [(0, size - len(part)), *[(0, 0)] * 3]
            yield np.arange(start, start + len(part)), {"pixels": np.pad(part, missing)}


def encoder_of(model: Model, *, column: str = "text", **options: Any) -> Encoder:
    """The encoder of a column's tower, of texts or of pictures. Raises ConfigError where there is no such tower."""
    if column not in COLUMNS:
        raise ConfigError(f"there is no column {column!r} of texts; {nearest(column, COLUMNS)}")
    if column == "image" or (column == "text" and len(model.config.encoders) > 1):
        column = side_of(model.config, column, column == "image")
    pictures = isinstance(model.config.towers[model.config.tower_of(column)], config.ImageTower)
    return (PictureEncoder if pictures else Encoder)(model, column=column, **options)


def side_of(model: config.Model, column: str, pictures: bool) -> str:
    """The column of `model` to encode texts, or pictures, as: the one named where its tower takes those, else the side of a
    search whose tower does. Raises ConfigError for a model without such a tower, or one that has two for a plain text."""
    kind = config.ImageTower if pictures else config.Tower
    roles = [role for role in config.ROLES if isinstance(model.towers[model.tower_of(role)], kind)]
    if not roles:
        raise ConfigError(f"the model has no tower that takes {'pictures' if pictures else 'texts'}")
    if column not in ("text", "image"):
        return column if isinstance(model.towers[model.tower_of(column)], kind) else roles[0]
    if len(roles) == 1:
        return roles[0]
    model.tower_of(column)  # raises where there are two
    return column


def _decoded(picture: Any) -> Image.Image:
    try:
        return decoded(picture)
    except ValueError as error:
        named = f"{picture}: " if isinstance(picture, str | os.PathLike) else ""
        raise DataError(f"{named}{error}") from None


def asked(model: config.Model, column: str, prompt: str | None = None, task: str | None = None) -> tuple[str | None, str]:
    """The names of the prompt (None for the default) and of the adapter (empty for the default) that the texts of a column are
    encoded with. Raises ConfigError for a column that is none, and for a task that no tower knows.

    A side of a task that has a prompt for the other side alone has that of its role, as a text has without a task.
    """
    if column not in COLUMNS:
        raise ConfigError(f"there is no column {column!r} of texts; {nearest(column, COLUMNS)}")
    tower, towers = model.towers[model.tower_of(column)], [model.towers[name] for name in model.encoders]
    named, adapter = tower.prompt_named(task or "", column), task if task and task in tower.lora else ""
    if task and not named and not adapter and (column == "text" or not any(other.knows(task) for other in towers)):
        known = [name for other in towers for name in (*(other.prompts or {}), *other.lora)]
        raise ConfigError(f"there is no prompt and no adapter {task!r}; {nearest(task, known)}")
    # A tower of its own for each side never met a text without the prompt of its side.
    by_role = tower.prompt_for(column) if column in config.ROLES or len(towers) > 1 else None
    return prompt if prompt is not None else named or by_role, adapter


def plan(
    lengths: Int[np.ndarray, " N"], longest: int, tokens: int, devices: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """(row numbers, (rows, length) of the padded batch), longest rows first.

    From the longest down every batch is full, so there is one shape a bucket, plus one for the last batch, whose rows are
    halved while half would do. Rows are a multiple of the number of devices; no batch is longer than `longest`.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = min(bucket(int(lengths[order[start]])), longest)
        each = max(1, tokens // length)
        while each > 1 and len(order) - start <= each // 2 * devices:
            each //= 2
        yield order[start : start + each * devices], (each * devices, length)
        start += each * devices


def bucket(length: int) -> int:
    """Lengths are padded to multiples of 8 up to 64, then of 32."""
    step = 8 if length <= 64 else 32
    return max(8, -(-length // step) * step)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while the caller works on this one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def mesh_of(tree: Any) -> DeviceMesh:
    """The mesh that parameters are on; for those on one device, or on the host, a mesh of one device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            if isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, DeviceMesh):
                return leaf.sharding.mesh
            return sharding.make_mesh(config.Mesh(), [next(iter(leaf.devices()))])
    return sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])


def fingerprint(model: Model, column: str = "text") -> str:
    """SHA-256 of all that decides a column's vectors: weights, architecture and head, tokenizer, prompts."""
    tower = model.config.tower_of(column)
    embedder = model.embedders[tower]
    said: tuple = (embedder,)
    if texts := model.texts.get(tower):
        said += (texts.max_length, sorted(texts.prompts.items()), texts.default_prompt, texts.include_prompt)
    said += tuple(sorted(model.config.towers[tower].lora.items()))
    digest = hashlib.sha256(repr(said).encode())
    digest.update(texts.tokenizer.to_str().encode() if texts else b"")
    leaves = jax.tree_util.tree_leaves_with_path(model.params["towers"][tower])
    for path, leaf in sorted(leaves, key=lambda item: sharding.path_of(item[0])):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{sharding.path_of(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _padded(columns: Columns, rows: np.ndarray, shape: tuple[int, int]) -> Columns:
    """Some rows as a batch of a given shape. Rows of padding attend to one token, so that their means are finite."""
    count, length = shape
    kept = min(length, columns["ids"].shape[1])
    batch = {name: np.zeros(shape, x.dtype) for name, x in columns.items()}
    for name, x in columns.items():
        batch[name][: len(rows), :kept] = x[rows, :kept]
        if x.dtype == bool:
            batch[name][len(rows) :, 0] = True
    return batch


def _on(mesh: DeviceMesh, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat):
        return leaf
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding.replicated(mesh), lambda at: array[at])


@functools.lru_cache(maxsize=64)
def _forward(embedder: Embedder | ImageEmbedder, mesh: DeviceMesh) -> Callable[[Any, Any], jax.Array]:
    """Compiled once a shape for all calls with equal embedders. Vectors are replicated, so that every host reads them."""
    apply = sharding.in_sight(mesh, lambda params, column: embedder.apply(params, column).pooled)
    return jax.jit(apply, out_shardings=sharding.replicated(mesh))

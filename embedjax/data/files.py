"""Files as the sources see them: patterns and folders resolved, bytes mapped into memory, unpacked or fetched once.

Does not know what is in them.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import mmap
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Iterator

from embedjax.config.errors import ConfigError, DataError, StorageError

SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing"}

# What file systems of fsspec call the version or the date of a file.
CHANGED = ("etag", "ETag", "md5Hash", "updated", "LastModified", "mtime", "created")


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """A file of a source: its size in bytes and how many rows of it the source holds."""

    path: str
    size: int
    rows: int

    @property
    def changed(self) -> str:
        """When it was changed, or what stands for that; with the size it tells whether a file is what it was."""
        return file_state(self.path)[2]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the whole file as it is stored; read at the first use, in constant memory."""
        with reading(self.path), open_binary(self.path) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


def file_info(path: str, rows: int) -> FileInfo:
    """FileInfo of a local or remote file."""
    with reading(path):
        return FileInfo(path, _size(path), rows)


def file_state(path: str) -> tuple[str, int, str]:
    """(whole path, bytes, when it was changed or what stands for it) of a local or remote file."""
    with reading(path):
        if not is_remote(path):
            found = os.stat(path)
            return os.path.abspath(path), found.st_size, str(found.st_mtime_ns)
        import fsspec.core

        fs, name = fsspec.core.url_to_fs(path)
        info = fs.info(name)
        return path, int(info["size"] or 0), next((str(info[key]) for key in CHANGED if info.get(key)), "")


def cache_folder(name: str) -> pathlib.Path:
    """Where things are kept between commands; it may be deleted at any time."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "embedjax" / name


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str) -> io.BufferedIOBase:
    """Open a local path or a URL that fsspec knows for reading."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec.core

    fs, name = fsspec.core.url_to_fs(path)
    return fs.open(name, "rb")


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what reading a file may raise into one DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path}: corrupt or truncated gzip: {e}") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None
    except ImportError as e:  # fsspec's package for this protocol
        raise DataError(f"{path}: {e}") from None


def expand(path: str) -> list[str]:
    """The files that a path, a glob pattern, a folder of Parquet files, or a URL of these names, in sorted order."""
    if not path:
        raise ConfigError("a source has an empty path; give a file, a glob pattern or a folder of Parquet files")
    with reading(path):
        return _expand_remote(path) if is_remote(path) else _expand_local(os.path.expanduser(path))


def _expand_local(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = glob.glob("**/*.parquet", root_dir=path, recursive=True)
        return [os.path.join(path, name) for name in _one_split(path, found)]
    if _is_pattern(path):
        return _matches(path, [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)])
    if os.path.exists(path):
        raise DataError(f"{path}: not a regular file")
    raise FileNotFoundError(path)


def _expand_remote(path: str) -> list[str]:
    import fsspec.core

    try:
        fs, root = fsspec.core.url_to_fs(path)
    except ValueError as e:  # an unknown protocol
        raise DataError(f"{path}: {e}") from None
    if fs.isfile(root):
        return [path]
    if fs.isdir(root):
        found = [name.removeprefix(root).lstrip("/") for name in fs.glob(f"{root.rstrip('/')}/**/*.parquet")]
        return [f"{path.rstrip('/')}/{name}" for name in _one_split(path, found)]
    if _is_pattern(path):
        return _matches(path, [fs.unstrip_protocol(name) for name in fs.glob(root) if fs.isfile(name)])
    raise FileNotFoundError(path)


def _is_pattern(path: str) -> bool:
    return any(c in path for c in "*?[")


def _matches(pattern: str, names: list[str]) -> list[str]:
    if not names:
        raise DataError(f"{pattern}: no file matches")
    return sorted(names)


def _one_split(folder: str, names: list[str]) -> list[str]:
    """The Parquet files of a folder. Refuses to mix splits or configurations, for that would train on the test set."""
    if not names:
        raise DataError(f"{folder}: a folder without Parquet files; expected a file, a glob pattern or a folder of *.parquet")
    names = sorted(names)
    splits = sorted({word for name in names for word in re.split(r"[^a-z]+", name.lower())} & SPLITS)
    if len(splits) > 1:
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one by a pattern such as *{splits[0]}*.parquet")
    inside = sorted({os.path.dirname(name) or "." for name in names})
    if len(inside) > 1:
        raise DataError(f"{folder}: holds Parquet files in the folders {', '.join(inside)}; name one of them")
    return names


def content(path: str) -> mmap.mmap:
    """The bytes of a file, mapped: `data[a:b]` is safe from any thread and nothing stays in memory.

    .gz is unpacked and a remote file fetched, once, into a temporary file without a name, which ends with the process.
    """
    with reading(path):
        if not is_remote(path) and not path.endswith(".gz"):
            with open(path, "rb") as f:
                return _mapped(path, f)
        with open_binary(path) as raw, tempfile.TemporaryFile() as spool:
            _fill(path, gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw, spool)
            return _mapped(path, spool)


@contextlib.contextmanager
def local_file(path: str) -> Iterator[str]:
    """A local name of a file, for readers that want one. A remote file is fetched, and its name removed at the end of the
    block: a reader that has opened it keeps it.
    """
    with reading(path):
        if not is_remote(path):
            os.stat(path)
            yield path
            return
        with open_binary(path) as raw, tempfile.NamedTemporaryFile() as spool:
            _fill(path, raw, spool)
            yield spool.name


def _fill(path: str, source, spool) -> None:
    while block := source.read(1 << 20):
        try:
            spool.write(block)
        except OSError as e:
            raise StorageError(f"{path}: no room to unpack it in {tempfile.gettempdir()}: {e.strerror}; set TMPDIR") from None
    spool.flush()


def _mapped(path: str, f) -> mmap.mmap:
    if not os.fstat(f.fileno()).st_size:
        raise DataError(f"{path}: the file is empty")
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _size(path: str) -> int:
    if not is_remote(path):
        return os.path.getsize(path)
    import fsspec.core

    fs, name = fsspec.core.url_to_fs(path)
    return int(fs.size(name) or 0)

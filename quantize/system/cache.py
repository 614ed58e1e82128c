"""What can be made again: file hashes, checkpoints dequantized from GGUF, 16-bit GGUF intermediates, baselines.

In: a root folder. Out: paths of finished entries, each made once, under a lock, and put in place by one rename.
Losing the cache costs time, never an artifact.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from quantize.errors import StoreError, disk_full, first_line, is_disk_full
from quantize.system.flock import NO_LOCKS, NO_LOCKS_HINT, file_lock

CHUNK_BYTES = 4 << 20


def default_cache_root() -> Path:
    """$QUANTIZE_CACHE, else the user's cache folder as the platform has it."""
    import platformdirs

    given = os.environ.get("QUANTIZE_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("quantize"))


class Cache:
    """A folder of entries that are complete as soon as they are visible."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def sha256(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """Hex sha256 of a file, read again only if its path, size, mtime or inode differ from last time.

        progress: called with the number of bytes of each chunk that is read. Raises StoreError, OSError.
        """
        path = path.resolve()
        stat = path.stat()
        seen = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        with closing(self._database()) as database:
            query = "SELECT sha256 FROM hashes WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?"
            row = database.execute(query, seen).fetchone()
            if row is not None:
                return str(row[0])
            digest = hash_file(path, progress)
            _remember(database, "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", (*seen, digest))
        return digest

    def paths_with(self, sha256: str) -> list[Path]:
        """Files that had this hash when they were last read, and have not changed since. Raises StoreError."""
        with closing(self._database()) as database:
            query = "SELECT path, size, mtime_ns, inode FROM hashes WHERE sha256 = ? ORDER BY path"
            rows = database.execute(query, (sha256,)).fetchall()
        return [Path(path) for path, *seen in rows if _stamp(Path(path)) == tuple(seen)]

    def fact(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` says of some content, as JSON data, remembered under `key`: for what is costly to find out."""
        with closing(self._database()) as database:
            row = database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return json.loads(row[0])
            value = find()
            _remember(database, "INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))
        return value

    def entry(self, kind: str, key: str) -> Path:
        """Where the entry is, or would be."""
        return self.root / kind / key

    def make(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The entry's folder; if it is not there, `build` fills a scratch folder that then becomes it.

        Two processes that ask at once: the second waits and gets what the first made. Raises StoreError, DiskFullError,
        and what `build` raises of ours.
        """
        final = self.entry(kind, key)
        if final.is_dir():
            return final
        with self._errors():
            final.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(final.parent / f".{key}.lock"):
                if final.is_dir():
                    return final
                _remove_leftovers(final)
                scratch = final.with_name(f".{key}.{uuid.uuid4().hex[:8]}.tmp")
                scratch.mkdir()
                try:
                    build(scratch)
                    scratch.rename(final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        return final

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the system says of the cache's folder, as ours."""
        try:
            yield
        except OSError as exc:
            if is_disk_full(exc):
                raise disk_full(exc, self.root) from exc
            what = exc.strerror or first_line(exc)
            hint = NO_LOCKS_HINT if exc.errno in NO_LOCKS else "it must be a folder that can be written"
            hint = f"{hint}; QUANTIZE_CACHE says where it is"
            raise StoreError(f"cache {self.root}: {what} ({exc.filename or 'no file'})", hint=hint) from exc

    @contextmanager
    def using(self, kind: str, key: str, build: Callable[[Path], None]) -> Iterator[Path]:
        """As `make`, and while the context is open nobody removes the entry as unused. Raises StoreError."""
        while True:
            folder = self.make(kind, key, build)
            with self._use_lock(kind, key, fcntl.LOCK_SH) as held:
                if held and folder.is_dir():
                    yield folder
                    return

    def remove_unused(self, kind: str, key: str) -> bool:
        """Drop an entry unless somebody is using it; whether it is gone."""
        if not self.entry(kind, key).is_dir():
            return True
        with self._use_lock(kind, key, fcntl.LOCK_EX | fcntl.LOCK_NB) as held:
            if held:
                self.remove(kind, key)
            return held

    @contextmanager
    def _use_lock(self, kind: str, key: str, how: int) -> Iterator[bool]:
        """A lock that any number of users share, and that a remover has alone; False if it is not to be had."""
        with self._errors():
            file = (self.root / kind / f".{key}.use").open("ab")
        with file:
            with self._errors():
                try:
                    fcntl.flock(file, how)
                    held = True
                except (BlockingIOError, PermissionError):
                    held = False
            yield held

    def remove(self, kind: str, key: str) -> None:
        """Drop an entry."""
        shutil.rmtree(self.entry(kind, key), ignore_errors=True)

    def _database(self) -> sqlite3.Connection:
        """What is remembered; on a disk that is full only as long as it is open. Raises StoreError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return _with_tables(sqlite3.connect(self.root / "index.sqlite", timeout=60))
        except (OSError, sqlite3.Error) as exc:
            if is_disk_full(exc):
                return _with_tables(sqlite3.connect(":memory:"))
            hint = "set QUANTIZE_CACHE to a folder that can be written"
            raise StoreError(f"cache {self.root} can't be used: {exc}", hint=hint) from exc


def _with_tables(database: sqlite3.Connection) -> sqlite3.Connection:
    try:
        database.execute(
            "CREATE TABLE IF NOT EXISTS hashes"
            " (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT)"
        )
        database.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT)")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _remember(database: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> None:
    """Write a row; a full disk or a read-only cache costs the time to find it out again, and nothing else."""
    with suppress(sqlite3.OperationalError), database:
        database.execute(statement, values)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def are_whole(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether files that a stopped build left are there as it left them. files: name -> sha256."""
    paths = {folder / Path(name).name: sha256 for name, sha256 in files.items()}
    return all(path.is_file() and hash_file(path) == sha256 for path, sha256 in paths.items())



def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, mtime and inode of a file; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _remove_leftovers(final: Path) -> None:
    """Scratch folders of a build that was killed; its lock is ours now, so nobody works in them."""
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)

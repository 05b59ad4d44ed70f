"""The content-addressed cache of compiled kernels and linked programs on disk.

A key is the hash of everything that decides the bytes (the PrimFunc's structure, the target, the versions),
so an entry never goes stale and is never changed: it is written beside its place and renamed into it. Two processes
that make the same entry at once write the same bytes; the second rename replaces the first. A writer that
dies leaves a file under a temporary name, which the next clean-up removes.

Every entry ends in a trailer with its SHA-256. A truncated or flipped entry is therefore noticed when it is
read, removed and made again. (The tail of an ELF file is free: linkers and loaders read it by its headers.)

A cache that cannot be written (read-only, disk full, no home) is a warning, once; the entries of this
process are then kept in memory only.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ..ir import config

log = logging.getLogger("treadle.cache")

_MAGIC = b"TREADLE1"
_TRAILER = len(_MAGIC) + hashlib.sha256().digest_size
_MEMORY_BYTES = 64 << 20
_STALE_SECONDS = (
    3600.0  # age at which a temporary file is a dead writer's; also how often an entry's time is renewed
)
_PRUNE_TO = 0.8


def digest(*parts: object) -> str:
    """A key: 40 hex digits that depend on every part's text and on their order."""
    state = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        state.update(len(text).to_bytes(8, "little") + text)
    return state.hexdigest()[:40]


def default_directory() -> Path:
    """TREADLE_CACHE_DIR, or `treadle` in the user's cache folder."""
    chosen = config.get("TREADLE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("treadle", appauthor=False))


class Cache:
    """Bytes under keys, in `directory`, pruned to `limit` bytes, least recently used first.

    Safe for threads and processes."""

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = Path(directory) / "v1", limit
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._lock = threading.Lock()
        self._warned = False
        self._written = limit  # so that the first write of a process looks at the size
        self.hits = self.misses = 0

    def path(self, name: str) -> Path:
        """Where the entry `name` ("<key>.o", "<key>.so") is or would be."""
        return self.directory / name[:2] / name

    def get(self, name: str) -> bytes | None:
        """The entry, verified, or None."""
        with self._lock:
            data = self._memory.get(name)
            if data is not None:
                self._memory.move_to_end(name)
        if data is None:
            data = self._read(self.path(name))
            if data is not None:
                self._remember(name, data)
        with self._lock:
            self.hits, self.misses = self.hits + (data is not None), self.misses + (data is None)
        return data

    def put(self, name: str, data: bytes | memoryview, checksum: bytes | None = None) -> None:
        """Publish an entry. Never raises for a disk that cannot be written. `checksum`: its SHA-256, if it is known."""
        if isinstance(data, bytes):
            self._remember(name, data)
        path = self.path(name)
        temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(6)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.write(_MAGIC + (checksum or hashlib.sha256(data).digest()))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            self._unwritable(error)
            return
        with self._lock:
            self._written += len(data)
            due, self._written = (True, 0) if self._written >= self.limit // 16 else (False, self._written)
        if due:
            self.prune()

    def fill(self, name: str, room: memoryview) -> bool:
        """Reads an entry of exactly this size to where it is wanted, and verifies it; False if there is none."""
        path = self.path(name)
        try:
            with open(path, "rb") as file:
                whole = file.readinto(room) == len(room)
                trailer = file.read()
        except OSError:
            return False
        if not whole or trailer != _MAGIC + hashlib.sha256(room).digest():
            self._damaged(path)
            return False
        self._used(path)
        return True

    def holds(self, name: str, nbytes: int) -> bool:
        """Whether there is an entry of this size; it counts as used."""
        path = self.path(name)
        with contextlib.suppress(OSError):
            if path.stat().st_size == nbytes + _TRAILER:
                self._used(path)
                return True
        return False

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Holds up other processes that are about to make the same entry: the ranks of a job compile one program once.

        A process that dies lets go; where files cannot be locked nobody waits, and an entry may be made twice.
        """
        path = self.path(name).with_name(f".tmp-lock-{name}")
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "wb"))
                fcntl.flock(file, fcntl.LOCK_EX)
                held.callback(path.unlink, missing_ok=True)
            yield

    def discard(self, name: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._memory_bytes -= len(self._memory.pop(name, b""))
        with contextlib.suppress(OSError):
            self.path(name).unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove dead writers' files, and the least recently used entries beyond the size limit."""
        entries, total, now = [], 0, time.time()
        for path, status in self._files():
            if path.name.startswith(".tmp-"):
                if now - status.st_mtime > _STALE_SECONDS:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                continue
            entries.append((status.st_mtime, status.st_size, path))
            total += status.st_size
        if total <= self.limit:
            return
        removed = 0
        for _, size, path in sorted(entries):
            if total - removed <= self.limit * _PRUNE_TO:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                removed += size
        log.info("cache %s: removed %.1f MB of least recently used entries", self.directory, removed / 1e6)

    def nbytes(self) -> int:
        """Bytes on disk, temporary files included."""
        return sum(status.st_size for _, status in self._files())

    def clear(self) -> None:
        """Remove every entry."""
        with self._lock:
            self._memory.clear()
            self._memory_bytes = 0
        for path, _ in self._files():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------------

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            folders = [entry.path for entry in os.scandir(self.directory) if entry.is_dir()]
        except OSError:
            return
        for folder in folders:
            with contextlib.suppress(OSError), os.scandir(folder) as found:
                for entry in found:
                    with contextlib.suppress(OSError):
                        yield Path(entry.path), entry.stat()

    def _read(self, path: Path) -> bytes | None:
        try:
            content = path.read_bytes()
        except OSError:
            return None
        data, trailer = content[:-_TRAILER], content[-_TRAILER:]
        if trailer != _MAGIC + hashlib.sha256(data).digest():
            self._damaged(path)
            return None
        self._used(path)
        return data

    def _damaged(self, path: Path) -> None:
        log.warning("cache entry %s is damaged; it is made again", path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _used(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                os.utime(path)

    def _remember(self, name: str, data: bytes) -> None:
        if len(data) > _MEMORY_BYTES // 4:
            return
        with self._lock:
            self._memory_bytes += len(data) - len(self._memory.pop(name, b""))
            self._memory[name] = data
            while self._memory_bytes > _MEMORY_BYTES:
                self._memory_bytes -= len(self._memory.popitem(last=False)[1])

    def _unwritable(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the kernel cache %s cannot be written (%s): kernels are compiled again next time",
                self.directory,
                error,
            )


@functools.cache
def _cache_at(directory: Path, limit: int) -> Cache:
    return Cache(directory, limit)


def cache() -> Cache:
    """The cache that the environment names at this moment (one object per folder and process)."""
    return _cache_at(default_directory(), config.get("TREADLE_CACHE_BYTES"))

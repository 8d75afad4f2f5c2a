"""Shards in remote storage (http, S3, GCS, ...: whatever fsspec opens), with local copies of bounded total size.

The indices are small and are read whenever a source is opened; a tar is copied when one of its rows is needed. A copy
is named after its hash, appears when it is complete and its hash is right, and may be shared by sources, runs and
processes. The least recently used copies are removed first.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmopd.errors import ConfigError, DataError, UserError
from mmopd.prompts.index import SUFFIX, Index, index_path

BLOCK = 1 << 22
ATTEMPTS = 3


def is_remote(location: str | Path) -> bool:
    """Return True for a URL, False for a path."""
    return isinstance(location, str) and "://" in location


class Cache:
    """A folder of local copies, of `max_bytes` in total; several processes may use it in parallel."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, url: str, size: int, sha256: str) -> Path:
        """Return a local copy of a file.

        Raises:
            DataError: the file cannot be copied, or differs from what its index says; names it.
        """
        copy = self.folder / f"{sha256}.tar"
        if not self._touch(copy):
            with self._lock(sha256):
                if not self._touch(copy):  # unless another process has copied it meanwhile
                    self._evict(size)
                    _download(url, size, sha256, copy)
                    self._touch(copy)
        return copy

    def _touch(self, copy: Path) -> bool:
        """Mark a copy as used now; return False if there is none."""
        now = time.time_ns()  # the file system's own clock ticks too slowly to order two uses
        try:
            os.utime(copy, ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{name}.lock").open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, coming: int) -> None:
        """Remove old copies to make room; a copy that is being read stays readable until it is closed."""
        copies = sorted(
            (stat.st_mtime_ns, stat.st_size, path) for path in self.folder.glob("*.tar") if (stat := path.stat())
        )
        total = coming + sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


class Remote:
    """The shards under a URL.

    Args:
        url: a folder, as fsspec writes it: `s3://bucket/path`, `https://host/path`, ...
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url.rstrip("/")
        self._cache = cache

    def read_indices(self) -> Path:
        """Copy the indices into a folder of their own, in place of earlier ones, and return that folder.

        Raises:
            DataError: nothing can be listed or read under the URL.
        """
        folder = self._cache.folder / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url)
            found = {
                name.rstrip("/").rpartition("/")[2]: name
                for name in system.ls(path, detail=False)
                if name.endswith(SUFFIX)
            }
            for name, remote in found.items():
                unfinished = folder / f".{name}.{os.getpid()}"
                unfinished.write_bytes(system.cat_file(remote))
                unfinished.replace(folder / name)
        except Exception as error:  # each file system raises its own errors
            raise DataError(f"{self.url}: the shards cannot be read: {_why(error)}") from None
        for old in folder.glob(f"*{SUFFIX}"):
            if old.name not in found:
                old.unlink()
        if not found:
            raise DataError(f"{self.url}: it has no *{SUFFIX} files, so it is not a folder of shards")
        return folder

    def fetch(self, index: Index) -> Path:
        """Return a local copy of a tar."""
        return self._cache.get(f"{self.url}/{index.tar.name}", index.size, index.sha256)

    def read(self, index: Index, row: int) -> list[bytes]:
        """Read a row from a local copy, as `Index.read` does."""
        for _ in range(ATTEMPTS):
            try:
                return index.read(self.fetch(index), row)
            except FileNotFoundError:
                pass  # another process evicted the copy before it was read
        raise ConfigError(
            f"{self._cache.folder}: copies of shards are removed before they are read; raise cache_gib of the mixture"
        )


def _download(url: str, size: int, sha256: str, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        digest = _persistently(_copy)(url, size, unfinished)
        if digest != sha256:
            raise DataError(
                f"{url}: its content is not what {index_path(Path(url)).name} was made from; write the source again"
            )
        unfinished.replace(target)
    except UserError:
        raise
    except Exception as error:  # each file system raises its own errors
        raise DataError(f"{url}: the shard cannot be read: {_why(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _persistently(copy: Callable[[str, int, Path], str]) -> Callable[[str, int, Path], str]:
    """Return `copy` with retries after errors, except where the file itself is wrong (UserError)."""
    from tenacity import retry, retry_if_not_exception_type, stop_after_attempt, wait_exponential

    return retry(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(0.2, max=5),
        retry=retry_if_not_exception_type(UserError),
        reraise=True,
    )(copy)


def _copy(url: str, size: int, target: Path) -> str:
    """Copy a file of a known size and return its hash."""
    import fsspec

    digest = hashlib.sha256()
    copied = 0
    with fsspec.open(url, "rb") as source, target.open("wb") as file:
        while block := source.read(BLOCK):
            copied += len(block)
            if copied > size:
                break  # too long to be the shard
            digest.update(block)
            file.write(block)
    if copied > size:
        raise DataError(f"{url}: larger than the {size} bytes in its index: replaced; write the source again")
    if copied < size:
        raise OSError(f"it ended after {copied} of {size} bytes")
    return digest.hexdigest()


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

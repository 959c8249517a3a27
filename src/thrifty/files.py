"""Writing files so that a crash or a full disk leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from thrifty.errors import ThriftyError

ELSEWHERE = {
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG,
}  # fmt: skip
"""Errors of writing that no free space mends."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    A link stays one: what it points to is replaced.

    Raises:
        ThriftyError: the directory cannot be written, the disk is full, or `path` is there but is no regular file;
            it is untouched then.
    """
    target = _target(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or str(error)
        advice = "Choose" if getattr(error, "errno", None) in ELSEWHERE else "Free some space or choose"
        raise ThriftyError(f"cannot write {path}: {reason}. {advice} another place.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """An error, before anything takes long, where `replacing` could not write `path`; nothing is written.

    Raises:
        ThriftyError: as `replacing` does.
    """
    with suppress(_Enough), replacing(path):
        raise _Enough


class _Enough(Exception):  # noqa: N818 (it tells of no error)
    """Ends a writing that was a trial."""


def make_directory(path: str | Path) -> None:
    """Make the directory `path`, and those that it is in, where they are not there yet.

    Raises:
        ThriftyError: it cannot be made, or a file has its name.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ThriftyError(f"cannot make the directory {path}: {error.strerror}. Choose another place.") from error


def clear_partial(path: str | Path) -> None:
    """Remove what killed processes have left of `path` in `replacing`; no other process may be writing it."""
    path = _target(path)
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 in one step (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256()
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _target(path: str | Path) -> Path:
    """Where `path` leads, which is a regular file or nothing yet."""
    try:
        target = Path(path).resolve()
        special = target.exists() and not target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that no system takes
        reason = getattr(error, "strerror", None) or str(error)
        raise ThriftyError(f"cannot write {str(path)!r}: {reason}. Choose another place.") from error
    if special:
        kind = "a directory" if target.is_dir() else "a device or a pipe, not a file"
        raise ThriftyError(f"cannot write {path}: it is {kind}. Choose another place.")
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Files that appear whole, in directories that one process at a time writes to."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Make a file appear whole or not at all: a text or what a function writes goes beside it, then takes its place;
    that of the file that a link names, if it is one.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    held = io.BytesIO()  # torch.save into a file on a full disk says nothing of the disk
    if isinstance(content, str):
        held.write(content.encode())
    else:
        content(held)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_bytes(held.getvalue())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_directory(path: Path) -> None:
    """Raise a ValueError where a file stands in its way, or nothing can be written."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{there}: expected a directory, found a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there}: expected a directory that can be written to")


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory: two that write the same files spoil them for each other.

    Raises:
        BlockingIOError: another one is there.
    """
    if fcntl is None:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{directory}: another process writes there; wait for it, or take another directory"
            ) from None
        except OSError:  # a file system that cannot lock
            pass
        yield
    finally:
        os.close(handle)

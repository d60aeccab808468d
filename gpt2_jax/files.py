"""Files read with a word about what is wrong, written whole or not at all, and held alone."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt2_jax.errors import UserError


def read_text(path: Path) -> str:
    """Reads a UTF-8 file whole, newlines untouched.

    Raises:
      UserError: if the file cannot be read or is not UTF-8 (the first bad byte is named).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a readable file") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
            f"convert it first, for example with iconv -t UTF-8"
        ) from None


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A scratch path to write to; the file gets its name when the block ends well.

    After an error nothing of it is left, and what was there before still is.
    """
    scratch = path.with_name(f".{path.name}")
    try:
        yield scratch
        with scratch.open("rb") as data:
            os.fsync(data.fileno())  # or a power failure could leave the name without the content
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, or replaces it."""
    with written_beside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def directory_written_beside(directory: Path) -> Iterator[Path]:
    """A scratch directory to put files in; it gets the name when the block ends well.

    Folders on the way are made. After an error nothing of it is left, and what was there before
    still is; it goes when the block ends well.
    """
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-new-", dir=directory.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's own mode hides the files from everyone else
        yield scratch
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors hides its files as well
            with file.open("rb") as data:
                os.fsync(data.fileno())
        replace_directory(scratch, directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def replace_directory(scratch: Path, directory: Path) -> None:
    """Renames scratch to directory; what was there steps aside first and goes last."""
    if not directory.exists():
        scratch.replace(directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    try:
        directory.replace(aside)
        scratch.replace(directory)
    except BaseException:
        # An interrupt too must leave what was there in its place.
        if directory.exists():
            aside.rmdir()
        else:
            aside.replace(directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def held(directory: Path, doing: str) -> Iterator[None]:
    """Keeps a directory for this process alone; the end of the process frees it too.

    Args:
      directory: it exists.
      doing: what a second process is told that the first one does there.

    Raises:
      UserError: if another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is {doing} {directory}; wait for it, end it or choose another"
            ) from None
        except OSError:
            pass  # a file system without locks: nothing to be done
        yield
    finally:
        os.close(descriptor)

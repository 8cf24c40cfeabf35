"""Write files that are the old or the new one at every instant, and that are safely on the disk."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock
from safetensors import SafetensorError

from .errors import UserError, one_line

LOCK_SECONDS = 60
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def is_disk_full(error: Exception) -> bool:
    """Whether the disk or a quota is full, or a file too large. safetensors gives the number only in its message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full)


def local_path(name: str) -> str:
    """The path of a file or folder as a user typed it: without file://, and with the home folder for ~.

    What exists under the very name is that: a `~x` here, or a file whose name has a %20.
    """
    path = name.removeprefix("file://").removeprefix("localhost" * name.startswith("file://localhost/"))
    if os.path.lexists(path):
        return path
    return unquote(path) if path != name and os.path.lexists(unquote(path)) else os.path.expanduser(path)


def same_place(one: str, other: str) -> bool:
    """Whether two names are those of the same file or folder on this machine."""
    paths = local_path(one), local_path(other)
    return all(map(os.path.exists, paths)) and os.path.samefile(*paths)


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a Hub repository; relative paths look the same."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name))


def missing_path(name: str, endings: Collection[str] = ()) -> str | None:
    """A message about a local path that doesn't exist, with the nearest that does; None if it may be a Hub id instead.

    A name can't be a Hub id if it has other characters, one of the file `endings`, or an existing folder as first part.
    """
    path = Path(local_path(name))
    below = len(path.parts) > 1 and os.path.isdir(path.parts[0])
    if is_hub_id(name) and path.suffix.lower() not in endings and not below:
        return None
    # os.path, because Path.is_dir raises an error for a folder that can't be read and for a name that is too long.
    parent = next(folder for folder in (*path.parents, Path()) if os.path.isdir(folder))
    wrong = "".join(path.relative_to(parent).parts[:1])
    near = get_close_matches(wrong, os.listdir(parent) if os.access(parent, os.R_OK) else [], n=1)
    return f"there is no file or folder {name}; " + (
        f"did you mean '{parent / near[0]}'?" if near else "check the path"
    )


def cannot_write(path: str | Path, error: Exception, what: str) -> UserError:
    """The error for a path that can't be written; `what` names what the user can change, e.g. "--output"."""
    return UserError(f"{path} can't be written ({one_line(error)}); name another {what}, or make room")


@contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Turn an OSError of what is done inside, which must only write, into `cannot_write`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, what) from error


def check_writable(path: str | None, what: str) -> None:
    """Raise the UserError of `writing` if a file can't be written; call it before hours of work. None passes."""
    if path is not None:
        with writing(path, what):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=Path(path).parent):
                pass


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Write a file that is the old or the new one at every instant: yields the temporary file to write instead."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # other processes may write the same file
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file, the old or the new one at every instant."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a small file, the old or the new one at every instant."""
    write_bytes(path, as_utf8(text).encode())


def as_utf8(text: str) -> str:
    """The text, with what UTF-8 can't encode (in file names, or from JSON) written as escapes such as \\udcff."""
    return text.encode(errors="backslashreplace").decode()


def plain_name(name: str) -> str:
    """The name of a file as plain text on one line: other bytes and control characters are written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], as_utf8(name))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, the old or the new file at every instant."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_bytes(path: Path) -> bytes:
    """Read a regular file; an OSError for anything else, because a FIFO or a device may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file; raises an OSError if it can't be read, a ValueError if it isn't JSON."""
    try:
        return json.loads(read_bytes(path))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Write files, each the old or the new one at every instant; `write` gets a temporary folder to fill."""
    temporary = folder / ".tmp-files"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for file in sorted(temporary.iterdir()):
            settle(file)
            file.replace(folder / file.name)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path, remedy: str = "name another folder") -> None:
    """Raise a UserError if `new_folder` can't write a folder, because it already exists and is not empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not empty; {remedy}")


@contextmanager
def new_folder(folder: Path, what: str = "folder") -> Iterator[Path]:
    """Write a folder that is complete or absent at every instant: yields the temporary folder to fill instead.

    Raises:
        UserError: if it can't be written; `what` is as in `cannot_write`. Other errors of the caller pass through.
    """
    final = folder.absolute()
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(folder, what):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(folder, what):
            for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
                settle(file)
            temporary.replace(final)
            fsync(final.parent)
    except (OSError, SafetensorError) as error:
        # The caller may also read other files, and these errors are not about writing.
        if is_disk_full(error) or Path(str(getattr(error, "filename", None))).is_relative_to(temporary):
            raise cannot_write(folder, error, what) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file for one process at a time, so that nothing is lost between reading and writing it.

    Raises an OSError if the lock can't be acquired within `LOCK_SECONDS`.
    """
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock, timeout=LOCK_SECONDS):
        try:
            yield
        finally:
            # Remove the lock while holding it: a process that waits for it then makes a new one.
            lock.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with everything in it, or a link but not its target."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Flush a file to the disk and set the user's usual permissions: safetensors lets only the owner read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

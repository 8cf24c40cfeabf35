"""Files that are the old or the new one at every instant, and safely on the disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_disk_full(error: Exception) -> bool:
    """Whether the disk, a quota or a limit on files is at its end. Safetensors says so in its text alone."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Write files into a folder so that each of them is the old or the new one at every instant.

    Args:
        folder: where they belong.
        write: writes them into the folder that it is given.
    """
    temporary = folder / ".tmp-files"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for file in sorted(temporary.iterdir()):
        settle(file)
        file.replace(folder / file.name)
    temporary.rmdir()
    fsync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file, the old or the new one at every instant."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(value: Any, path: Path) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Get a file onto the disk, as readable as the user's others: safetensors writes for the owner alone."""
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

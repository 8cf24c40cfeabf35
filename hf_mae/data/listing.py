"""The files of a local folder: each regular file once, and a count of what is left out."""

import errno
import heapq
import os
import stat
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, one_line, short
from ..files import as_utf8
from ..run_folder import RunFolder
from .splits import split_named

# Why something is left out: for one of them, and for several.
LINK_NOWHERE = ("link that leads nowhere", "links that lead nowhere")
LINK_TO_FILE = ("link to a file that is read already", "links to files that are read already")
LINK_TO_FOLDER = ("link to a folder that is read already", "links to folders that are read already")
LINK_UP = ("link to a folder above", "links to folders above")
READ_BY_LINK = ("folder that a link led to", "folders that links led to")
UNREADABLE = ("folder or link that can't be read", "folders or links that can't be read")
RUN = ("output folder of a run", "output folders of runs")
_SPECIAL = {
    stat.S_IFIFO: ("FIFO", "FIFOs"),
    stat.S_IFSOCK: ("socket", "sockets"),
    stat.S_IFCHR: ("device", "devices"),
    stat.S_IFBLK: ("device", "devices"),
}
_OTHER = ("special file", "special files")
_CONFIG = RunFolder("").config_file.name

Reason = tuple[str, str]


class LeftOut:
    """What is not read: a count and the first name for each reason."""

    def __init__(self) -> None:
        self._found: dict[Reason, tuple[int, str]] = {}

    def add(self, reason: Reason, first: str, count: int = 1) -> None:
        before = self._found.get(reason, (0, first))
        self._found[reason] = before[0] + count, before[1]

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        parts = (
            f"{count} {reason[count > 1]} ({'first ' * (count > 1)}{shown(first)})"
            for reason, (count, first) in self._found.items()
        )
        return ", ".join(parts)


def shown(name: str) -> str:
    """A file name as a message shows it: on one line."""
    return short(as_utf8(" ".join(name.split())))


Identity = tuple[int, int]  # device and inode


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        names: their paths relative to the folder, sorted, without hidden ones.
        same_file: groups of names that are one file: the file itself, if it has a name here, then links to it.
        left_out: what is there and can't be read, or is read already.
    """

    names: list[str] = field(default_factory=list)
    same_file: list[list[str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def list_folder(root: str) -> Listing:
    """List a local folder. Links are followed, but no folder is read twice, nor one that contains `root`.

    A file with several hard links counts as several files.

    Raises:
        DataError: if the folder itself can't be read.
    """
    listing = Listing()
    devices, inodes = array("Q"), array("Q")  # of the regular files among the names
    targets: dict[str, Identity] = {}  # of the links to files
    above = {_identity(os.stat(folder)) for folder in Path(os.path.realpath(root)).parents}
    read: set[Identity] = set()
    folders, links = [""], []
    # Links come last, those near the root first, so that a folder inside the data set keeps its own name.
    while folders or links:
        from_link = not folders
        prefix = folders.pop() if folders else heapq.heappop(links)[1]
        try:
            identity, entries = _scan(os.path.join(root, prefix))
        except OSError as error:
            if not prefix:
                raise DataError(f"cannot read {root}: {one_line(error)}; check the folder") from error
            listing.left_out.add(UNREADABLE, prefix[:-1])
            continue
        if identity in above or identity in read:
            reason = LINK_UP if identity in above else LINK_TO_FOLDER if from_link else READ_BY_LINK
            listing.left_out.add(reason, prefix[:-1])
            continue
        read.add(identity)
        if prefix and any(entry.name == _CONFIG for entry in entries):
            listing.left_out.add(RUN, prefix[:-1])
            continue
        first: list[str] = []
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_file(follow_symlinks=False):
                listing.names.append(name)
                devices.append(identity[0])
                inodes.append(entry.inode())
            elif entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            elif target := _target(entry, name, listing.left_out):
                if stat.S_ISREG(target.st_mode):
                    targets[name] = _identity(target)
                elif not prefix and split_named(entry.name):
                    first.append(f"{name}/")  # a split that was made of a link keeps its name
                else:
                    heapq.heappush(links, (name.count("/"), f"{name}/"))
        folders += first
    if targets:
        listing.same_file = _same_file(listing.names, zip(devices, inodes, strict=True), targets)
        listing.names += targets
    listing.names.sort()
    return listing


def _scan(path: str) -> tuple[Identity, list[os.DirEntry[str]]]:
    with os.scandir(path) as entries:
        return _identity(os.stat(path)), list(entries)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _target(entry: os.DirEntry[str], name: str, left_out: LeftOut) -> os.stat_result | None:
    """What a link leads to, if it is a file or folder; None for everything else, which is counted."""
    try:
        status = entry.stat()
    except OSError as error:
        left_out.add(LINK_NOWHERE if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) else UNREADABLE, name)
        return None
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return status
    left_out.add(_SPECIAL.get(stat.S_IFMT(status.st_mode), _OTHER), name)
    return None


def _same_file(names: list[str], identities: Iterable[Identity], targets: dict[str, Identity]) -> list[list[str]]:
    groups: dict[Identity, list[str]] = {identity: [] for identity in targets.values()}
    for name, identity in zip(names, identities, strict=True):
        if identity in groups and not groups[identity]:
            groups[identity].append(name)
    for name in sorted(targets):
        groups[targets[name]].append(name)
    return [group for group in groups.values() if len(group) > 1]

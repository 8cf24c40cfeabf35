"""`Place`, a data set that was found."""

import os
import posixpath
import re
from dataclasses import dataclass, field
from typing import Any

from ..files import plain_name
from .remote import is_remote
from .splits import folder_of

LABEL_NAMES = ("label", "labels", "fine_label", "cls")  # usual names of a column of labels


@dataclass
class Place:
    """A data set that was found. Each of its splits can be opened without another search.

    Attributes:
        name: what the user typed, without secrets.
        kind: `digits`, `disk` (made by `save_to_disk`), or the name of the `datasets` builder for these files.
        splits: split -> its files, as paths or URLs; for `imagefolder`, relative to `root`.
        root: path or URL of the folder, for `imagefolder` and `disk`.
        split_level: for `imagefolder`: number of folders above the split folders; None if there are none.
        builder: the `datasets` builder that found the files; None if this module found them.
        revision: commit of the Hub repository; None elsewhere.
        image_column: name of the image column, if the user gave one.
        label_column: name of the label column, if the user gave one.
        metadata: for `imagefolder`: tables of labels, relative to `root`.
        labels: path of a table of labels, if the user gave one.
        described: what lists the splits, if they aren't found by the names of files or folders.
        cache: what was found in these files; a copy made by `dataclasses.replace` starts without it.
    """

    name: str
    kind: str
    splits: dict[str, list[str]]
    root: str = ""
    split_level: int | None = None
    builder: Any = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    metadata: list[str] = field(default_factory=list)
    labels: str | None = None
    described: str | None = None
    cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def remote(self) -> bool:
        """Whether the files are read from URLs."""
        first_files = [files[0] for files in self.splits.values() if files]
        return self.revision is not None or any(is_remote(place) for place in (self.root, *first_files))

    @property
    def splits_from(self) -> str | None:
        """What tells the splits apart, such as "folder names"; None if there is only one."""
        if self.split_level is not None:
            return "folder names"
        if len(self.splits) < 2:
            return None
        if self.described:
            return self.described
        folders = [set(map(folder_of, files)) for files in self.splits.values()]
        apart = len(set().union(*folders)) == sum(map(len, folders))
        return "folder names" if apart else "file names"

    def urls(self, split: str) -> list[str]:
        """Paths or URLs of a split's files."""
        return [f"{self.root}/{name}" if self.kind == "imagefolder" else name for name in self.splits[split]]


def common_folder(paths: list[str]) -> str:
    """The longest folder that all paths or URLs start with, without a slash at its end."""
    # Not commonpath, which would turn :// into :/
    return os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071


def short_names(urls: list[str]) -> list[str]:
    """Plain file names; if they are not unique, paths relative to the common folder, and numbered if they must be."""
    paths = [without_query(url) for url in urls]
    folder = common_folder(paths)
    for names in (map(posixpath.basename, paths), (path.removeprefix(f"{folder}/") for path in paths)):
        plain = list(map(plain_name, names))
        if len(set(plain)) == len(urls):
            return plain
    return [f"{name} ({number})" for number, name in enumerate(plain)]


def without_query(url: str) -> str:
    """A path or URL without its query: only web servers have these, elsewhere the question mark is part of a name."""
    return url.split("?", 1)[0] if re.match(r"(\w+::)*https?://", url) else url

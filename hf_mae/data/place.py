"""`Place`, a data set that was found."""

import os
import posixpath
from dataclasses import dataclass
from typing import Any

from .remote import is_remote


@dataclass
class Place:
    """A data set that was found. Each of its splits can be opened without another search.

    Attributes:
        name: what the user typed.
        kind: `digits`, `disk` (made by `save_to_disk`), or the name of the `datasets` builder for these files.
        splits: split -> its files, as paths or URLs; for `imagefolder`, relative to `root`.
        root: path or URL of the folder, for `imagefolder` and `disk`.
        split_level: for `imagefolder`: number of folders above the split folders; None if there are none.
        builder: the `datasets` builder that found the files; None if this module found them.
        revision: commit of the Hub repository; None elsewhere.
        image_column: name of the image column, if the user gave one.
        label_column: name of the label column, if the user gave one.
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

    @property
    def remote(self) -> bool:
        """Whether the files are read from URLs."""
        first_files = [files[0] for files in self.splits.values() if files]
        return self.revision is not None or any(is_remote(place) for place in (self.root, *first_files))

    def urls(self, split: str) -> list[str]:
        """Paths or URLs of a split's files."""
        return [f"{self.root}/{name}" if self.kind == "imagefolder" else name for name in self.splits[split]]


def common_folder(paths: list[str]) -> str:
    """The longest folder that all paths or URLs start with, without a slash at its end."""
    # Not commonpath, which would turn :// into :/
    return os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071


def short_names(urls: list[str]) -> list[str]:
    """File names; if they are not unique, paths relative to the common folder."""
    paths = [url.split("?", 1)[0] if is_remote(url) else url for url in urls]
    names = [posixpath.basename(path) for path in paths]
    if len(set(names)) == len(urls):
        return names
    folder = common_folder(urls)
    return [url.removeprefix(f"{folder}/") for url in urls]

"""What a file is, as its ending tells."""

import posixpath
from collections import Counter
from collections.abc import Iterable

from .listing import LeftOut

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".npy"),
)
# Kinds are named after the builders of `datasets`, except for archives.
KINDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".zip": "archive"}
KINDS |= dict.fromkeys(IMAGE_EXTENSIONS, "imagefolder")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # labels of images, as in `datasets`
PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")

# Files that lie beside images and are not missed: texts, tables, annotations, programs.
_BESIDE = {
    *(".txt", ".md", ".rst", ".html", ".htm", ".pdf", ".bib", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xlsx"),
    *(".yaml", ".yml", ".toml", ".ini", ".cfg", ".names", ".data", ".py", ".ipynb", ".sh", ".m", ".log", ".lock"),
    *(".md5", ".sha1", ".sha256", ".db", ".url", ".lnk", ".download", ".cache"),
}
_BESIDE_NAMES = {"readme", "license", "licence", "copying", "notice", "authors", "changelog", "makefile", "manifest"}
_BESIDE_NAMES |= {"sha256sums", "md5sums", "_success", "desktop.ini"}
_ENDINGS_SHOWN = 5
_METADATA_ENDINGS = [posixpath.splitext(name)[1] for name in METADATA_FILES]


def ending(name: str, of_url: bool = False) -> str:
    """The ending of a file name, in lower case: ".jpg", ".tar.gz", or "" without a dot. A URL may have a query."""
    if of_url and "?" in name and (end := ending(name.split("?", 1)[0])) in KINDS:
        return end
    stem, last = posixpath.splitext(name.lower())
    return f".tar{last}" if last in PACKED and stem.endswith(".tar") else last


def kind_of(name: str, of_url: bool = False) -> str | None:
    """The kind of a file; None for one that isn't read."""
    return KINDS.get(ending(name, of_url))


class Endings:
    """Files of a folder by their ending; `of_url`: whether the names are parts of URLs.

    Attributes:
        metadata: tables of labels among the files.
    """

    def __init__(self, names: Iterable[str], of_url: bool = False):
        self._names: dict[str, list[str]] = {}
        for name in names:
            self._names.setdefault(ending(name, of_url), []).append(name)
        of_ending = [name for end in _METADATA_ENDINGS for name in self._names.get(end, [])]
        self.metadata = [name for name in of_ending if posixpath.basename(name) in METADATA_FILES]
        if ".parquet" in self._names:
            tables = set(self.metadata)
            self._names[".parquet"] = [name for name in self._names[".parquet"] if name not in tables]

    def of_kind(self, kind: str) -> list[str]:
        """The files of a kind, sorted."""
        return sorted(name for end, names in self._names.items() if KINDS.get(end) == kind for name in names)

    def kind(self) -> str | None:
        """The most frequent kind; parquet if there is any, since images may belong to a README."""
        kinds = Counter({kind: len(self.of_kind(kind)) for kind in dict.fromkeys(KINDS.values())})
        if kinds["parquet"]:
            return "parquet"
        kind, count = kinds.most_common(1)[0]
        return kind if count else None

    def others(self, kind: str | None) -> LeftOut:
        """The files that don't go with files of this kind: images of formats that aren't read, and so on."""
        left_out = LeftOut()
        left = (end for end in self._names if end not in _BESIDE and (kind is None or KINDS.get(end) != kind))
        others = {end: self._names[end] for end in left}
        for end, names in sorted(others.items(), key=lambda item: -len(item[1]))[:_ENDINGS_SHOWN]:
            missed = sorted(name for name in names if posixpath.basename(name).lower() not in _BESIDE_NAMES)
            if missed:
                text = f"{end} file" if end else "file without an ending"
                left_out.add((text, text.replace("file", "files", 1)), missed[0], len(missed))
        return left_out

"""Splits and classes, as the names of folders and files tell them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Split -> names that its folder may have, in any case, as in `datasets`.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
LEVELS = 3  # split folders are looked for in the folder itself, and one or two levels down
STRAYS = 0.01  # most of a split's images that may lie outside of its class folders

_SPLITS = {alias: split for split, aliases in SPLIT_FOLDERS.items() for alias in aliases}
_WORDS = "|".join(sorted((*_SPLITS, "holdout", "heldout", "hold[-_ ]?out", "held[-_ ]?out"), key=len, reverse=True))
_ALIKE = re.compile(rf"(?<![a-z])({_WORDS})(?:[-_ ]?(?:set|data|images?|imgs?))?(?![a-z])")


def nfc(text: str) -> str:
    """The same text in one form: macOS writes é in a file name as two characters, other systems as one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def split_named(folder: str) -> str | None:
    """The split whose folder may have this name."""
    return _SPLITS.get(folder.lower())


def like_split(name: str) -> str | None:
    """The split that a name such as `train_2019`, `testA` or `images-val` seems to mean; "test" for a hold-out."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    found = _ALIKE.search(words)
    return _SPLITS.get(found[1], "test") if found else None


def folder_of(name: str) -> str:
    """The folder of a file, without a slash at its end."""
    return name.rpartition("/")[0]


def find_splits(names: list[str]) -> tuple[dict[str, list[str]], int | None]:
    """Find split folders, up to two levels down.

    Returns:
        splits: split -> its names; {} if there are no split folders.
        level: number of folders above the split folders; None if there are none.
    """
    counts = Counter(map(folder_of, names))
    for level in range(LEVELS):
        split_of = {folder: _split_at(folder, level) for folder in counts}
        found = set(split_of.values()) - {None}
        # Further down, a folder called `test` may be one of many subjects.
        if found and (level == 0 or None not in split_of.values() or ("train" in found and len(found) > 1)):
            splits: dict[str, list[str]] = {split: [] for split in SPLIT_FOLDERS if split in found}
            for name in names:
                if split := split_of[folder_of(name)]:
                    splits[split].append(name)
            return splits, level
    return {}, None


def _split_at(folder: str, level: int) -> str | None:
    parts = folder.split("/", level + 1)
    return split_named(parts[level]) if len(parts) > level else None


def folders_like_splits(names: Iterable[str]) -> list[str]:
    """Folders, up to two levels down, whose names look like those of splits."""
    tops = {
        "/".join(folder.split("/")[: level + 1]) for folder in set(map(folder_of, names)) for level in range(LEVELS)
    }
    return sorted(folder for folder in tops if like_split(folder.rpartition("/")[2]))


def splits_of_shards(names: list[str]) -> dict[str, list[str]]:
    """Split -> its shards, by the names of their folders, or else by their own; {} if they don't name two splits."""
    for split_of in (_split_of_folders, _split_of_file):
        found: dict[str, list[str]] = {}
        for name in names:
            if split := split_of(name):
                found.setdefault(split, []).append(name)
        if len(found) > 1:
            return {split: found[split] for split in SPLIT_FOLDERS if split in found}
    return {}


def _split_of_folders(name: str) -> str | None:
    return next(filter(None, map(split_named, folder_of(name).split("/"))), None)


def _split_of_file(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.rpartition("/")[2])
    return next(filter(None, map(split_named, words)), None)


def class_folders(names: Iterable[str], level: int | None) -> dict[str, str]:
    """Folder -> class, for those folders of these files that are class folders; {} if there is only one class.

    Class folders lie side by side, apart from split folders at `level`. `names` are those of all splits.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    sizes: Counter[tuple[str, ...]] = Counter()
    for folder, count in Counter(map(folder_of, names)).items():
        parts = nfc(folder).split("/") if folder else []
        if level is not None:
            del parts[level : level + 1]
        if parts:
            groups.setdefault(tuple(parts[:-1]), {})[folder] = parts[-1]
            sizes[tuple(parts[:-1])] += count
    parents = [parent for parent, _ in sizes.most_common() if len(set(groups[parent].values())) > 1]
    return groups[parents[0]] if parents else {}


def strays(names: list[str], classes: dict[str, str]) -> tuple[list[str], bool]:
    """The files of a split that are not in a class folder, and whether they are few enough to be left out."""
    if not classes:
        return names, False
    found = [name for name in names if folder_of(name) not in classes]
    depth = min((folder.count("/") for folder in classes), default=0)
    above = all("/" not in name or folder_of(name).count("/") < depth for name in found)
    # One image above the class folders belongs to a README; deeper ones may be classes of another kind.
    return found, len(found) <= max(len(names) * STRAYS, above)

"""The name of a data set -> its files, their kind and its splits. No row is read."""

import glob
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import HfApi

from ..errors import DataError, SourceUnavailable, one_line
from ..files import local_path, missing_path, read_json
from ..keys.data_keys import SourceKeys
from .remote import is_remote, with_retries

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".npy"),
)
# Kinds are named after the builders of `datasets`.
_KINDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".zip": "zip"}
_KINDS |= dict.fromkeys(IMAGE_EXTENSIONS, "imagefolder")
# Split -> names that its folder may have.
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


@dataclass
class Place:
    """A data set that was found. Each of its splits can be opened without another search.

    Attributes:
        name: what the user typed.
        kind: `digits`, `disk` (made by `save_to_disk`), or the name of the `datasets` builder for these files.
        splits: split -> its files, as paths or URLs; for `imagefolder`, relative to `root`.
        root: path or URL of the folder, for `imagefolder` and `disk`.
        class_level: for `imagefolder`: split -> the folder that holds its class folders, such as "" or "train/".
        builder: the `datasets` builder that found the files; None if this module found them.
        revision: commit of the Hub repository; None elsewhere.
        image_column: name of the image column, if the user gave one.
        label_column: name of the label column, if the user gave one.
    """

    name: str
    kind: str
    splits: dict[str, list[str]]
    root: str = ""
    class_level: dict[str, str] = field(default_factory=dict)
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


def locate(keys: SourceKeys) -> Place:
    """Find a data set. Tries in this order: the built-in digits, a URL, a local path, the Hub.

    Raises:
        DataError: if nothing has this name, or it holds no images.
        SourceUnavailable: if the network failed on every try.
    """
    place = _locate(keys.dataset, keys.dataset_config, keys.dataset_revision)
    return replace(place, image_column=keys.image_column, label_column=keys.label_column)


def _locate(dataset: str, config_name: str | None, revision: str | None) -> Place:
    if dataset == "digits":
        return Place(dataset, "digits", {"train": []})
    if on_hub := re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?", dataset):
        return _locate_on_hub(dataset, on_hub[1], config_name, on_hub[2] or revision)
    path = local_path(dataset)
    if is_remote(path):
        return _locate_url(dataset)
    if os.path.isdir(path):
        return _locate_folder(dataset, path, config_name)
    patterns = _expand_braces(path)
    if files := [file for pattern in patterns for file in _matches(pattern, required=len(patterns) > 1)]:
        return _locate_files(dataset, files)
    if glob.has_magic(dataset):
        raise DataError(f"there is no file or folder {dataset}: nothing matches the pattern; check it")
    if missing := missing_path(path, (*_KINDS, ".gz", ".tgz")):
        raise DataError(missing)
    try:
        return _locate_on_hub(dataset, dataset, config_name, revision)
    except SourceUnavailable as error:
        raise SourceUnavailable(f"{error}; no local file or folder is called {dataset} either") from error


def _matches(pattern: str, required: bool) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    if required and not glob.has_magic(pattern):
        raise DataError(f"there is no file or folder {pattern}; check the numbers in the pattern")
    return sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))


def _expand_braces(pattern: str) -> list[str]:
    """`a-{008..010}` -> a-008, a-009, a-010."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    before, after, width = pattern[: match.start()], pattern[match.end() :], len(match[1])
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [expanded for number in numbers for expanded in _expand_braces(f"{before}{number:0{width}}{after}")]


def _kind(file: str) -> str | None:
    return _KINDS.get(posixpath.splitext(file.split("?", 1)[0])[1].lower())


def _kind_of_folder(names: Iterable[str]) -> str | None:
    """The most frequent kind of a folder's files; parquet if there is any, because images may belong to a README."""
    kinds = Counter(_kind(name) for name in names if posixpath.basename(name) != "metadata.parquet")
    kinds.pop(None, None)
    if "parquet" in kinds:
        return "parquet"
    return kinds.most_common(1)[0][0] if kinds else None


def _locate_folder(dataset: str, path: str, config_name: str | None) -> Place:
    index = Path(path, "dataset_dict.json")
    if index.is_file():
        return Place(dataset, "disk", {split: [] for split in _saved_splits(index)}, root=path)
    if all(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "state.json")):
        return Place(dataset, "disk", {"train": []}, root=path)
    names = sorted(_walk(path))
    kind = _kind_of_folder(names)
    if kind == "imagefolder" or kind is None:
        return _locate_images(dataset, path, names)
    # An absolute path, because a relative one may be the name of a builder of `datasets`, such as `text`.
    return _from_builder(dataset, load_builder(dataset, os.path.abspath(path), name=config_name))


def _saved_splits(index: Path) -> list[str]:
    """The splits that the `dataset_dict.json` of `save_to_disk` lists."""
    try:
        content = read_json(index)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {index}: {one_line(error)}; save the data set again") from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise DataError(f"{index} does not list the splits of a data set; save the data set again")
    return splits


def _walk(root: str) -> Iterable[str]:
    """Relative paths of a folder's files, without hidden ones. Follows links, except to a folder that contains them."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        prefix = "" if folder == root else Path(folder).relative_to(root).as_posix() + "/"
        yield from (prefix + file for file in files if not file.startswith("."))
        subfolders[:] = [name for name in subfolders if not (name.startswith(".") or _leads_back(folder, name))]


def _leads_back(folder: str, name: str) -> bool:
    """Whether a subfolder is a link to a folder that contains it."""
    path = os.path.join(folder, name)
    target = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath([target, os.path.realpath(folder)]) == target


def _locate_images(dataset: str, root: str, names: list[str]) -> Place:
    names = [name for name in names if _kind(name) == "imagefolder"]
    if not names:
        raise DataError(f"no images in {dataset}; expected files ending in {' '.join(IMAGE_EXTENSIONS)}")
    folders = {name.split("/", 1)[0] for name in names if "/" in name}
    found = {split: [name for name in aliases if name in folders] for split, aliases in SPLIT_FOLDERS.items()}
    class_level = {split: f"{aliases[0]}/" for split, aliases in found.items() if aliases} or {"train": ""}
    others = sorted(name for name in folders if f"{name}/" not in class_level.values())
    if others and any(found.values()):
        message = "%s has split folders (%s); its other folders are left out: %s"
        logger.warning(message, dataset, " ".join(class_level.values()), ", ".join(others[:5]))
    splits = {split: [name for name in names if name.startswith(folder)] for split, folder in class_level.items()}
    return Place(dataset, "imagefolder", splits, root, class_level)


def _locate_files(dataset: str, files: list[str]) -> Place:
    """Single files form one split, `train`."""
    kinds = {_kind(file) for file in files}
    kind = next(iter(kinds))
    if len(kinds) > 1 or kind is None or kind == "zip":
        endings = sorted({posixpath.splitext(file)[1] for file in files})
        raise DataError(f"{dataset} matches {' '.join(endings)} files; give one kind: .parquet, .tar, .arrow or images")
    if kind != "imagefolder":
        return Place(dataset, kind, {"train": files})
    root = common_folder(files) or ("" if files[0].startswith("/") else ".")
    names = files if root == "." else [file.removeprefix(f"{root}/") for file in files]
    return Place(dataset, kind, {"train": names}, root, {"train": ""})


def common_folder(paths: list[str]) -> str:
    """The longest folder that all paths or URLs start with, without a slash at its end."""
    # Not commonpath, which would turn :// into :/
    return os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071


def short_names(urls: list[str]) -> list[str]:
    """File names; if they are not unique, paths relative to the common folder."""
    names = [posixpath.basename(url.split("?", 1)[0]) for url in urls]
    if len(set(names)) == len(urls):
        return names
    folder = common_folder(urls)
    return [url.removeprefix(f"{folder}/") for url in urls]


def _locate_url(dataset: str) -> Place:
    files: list[str] = []
    for pattern in _expand_braces(dataset):
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
        except (ImportError, ValueError) as error:
            raise DataError(f"cannot open {pattern}: {one_line(error)}") from error
        if glob.has_magic(path):
            paths = with_retries(lambda fs=fs, path=path: fs.glob(path), dataset)
            files += [fs.unstrip_protocol(file) for file in paths]
        elif _kind(path):
            files.append(pattern)
        else:
            return _locate_url_folder(dataset, fs, path)
    if not files:
        raise DataError(f"nothing matches {dataset}; check the pattern")
    return _locate_files(dataset, sorted(files))


def _locate_url_folder(dataset: str, fs: Any, path: str) -> Place:
    from datasets.data_files import DataFilesDict, get_data_patterns

    root = fs.unstrip_protocol(path).rstrip("/")
    urls = [fs.unstrip_protocol(file) for file in with_retries(lambda: fs.find(path), dataset)]
    names = sorted(url.removeprefix(f"{root}/") for url in urls)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    kind = _kind_of_folder(names)
    if kind == "imagefolder" or kind is None:
        return _locate_images(dataset, root, names)
    # Splits are read from names by the rules of `datasets`, so that a bucket has the same splits as a local copy.
    endings = [ending for ending, its_kind in _KINDS.items() if its_kind == kind]
    patterns = with_retries(lambda: get_data_patterns(root), dataset)
    by_split = with_retries(
        lambda: DataFilesDict.from_patterns(patterns, base_path=root, allowed_extensions=endings), dataset
    )
    splits = {str(split): list(dict.fromkeys(files)) for split, files in by_split.items() if files}
    return Place(dataset, kind, splits, root)


def _locate_on_hub(dataset: str, repo: str, config_name: str | None, revision: str | None) -> Place:
    if "/" not in repo:
        # One-word names are from the Hub's early days. They redirect to a full name, which file URLs need.
        try:
            repo = with_retries(lambda: HfApi().dataset_info(repo, revision=revision), dataset).id
        except SourceUnavailable:
            raise
        except DataError as error:
            known = "neither a file or folder, nor the built-in set (digits), nor a data set on the Hub"
            raise DataError(f"{dataset} is {known}; check the name") from error
    return _from_builder(dataset, load_builder(dataset, repo, name=config_name, revision=revision))


def load_builder(dataset: str, path: str, **options: Any) -> Any:
    """Call `datasets.load_dataset_builder(path)`; all its exceptions become DataErrors about `dataset`.

    `path` is an absolute local path, a Hub id, or the name of a builder.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{dataset} needs the package datasets: pip install 'hf-mae[train]'") from error
    try:
        return with_retries(lambda: datasets.load_dataset_builder(path, **options), dataset)
    except DataError:
        raise
    except Exception as error:  # any: it lets those of its parsers through, for YAML among others
        text = one_line(error).split(" Example of usage", 1)[0]
        remedy = "check its README and files"
        if isinstance(error, ImportError):
            remedy = "install the missing package"
        elif "BuilderConfig" in text or "Config name is missing" in text:
            remedy = "choose one with --dataset_config NAME"
        raise DataError(f"{dataset}: {text}; {remedy}") from error


def _from_builder(dataset: str, builder: Any) -> Place:
    data_files = builder.config.data_files or {str(split): [] for split in builder.info.splits or {}}
    splits = {str(split): list(dict.fromkeys(map(str, files))) for split, files in data_files.items()}
    revision = None if builder.repo_id is None else builder.hash
    place = Place(dataset, builder.name, splits, builder=builder, revision=revision)
    if builder.name == "imagefolder":
        place.root = common_folder([file for files in splits.values() for file in files])
        for split, files in splits.items():
            names = [file.removeprefix(f"{place.root}/") for file in files if _kind(file) in ("imagefolder", "zip")]
            folder = common_folder(names)
            splits[split], place.class_level[split] = names, f"{folder}/" if folder else ""
    return place

"""The name of a data set -> its files, their kind and its splits. No row is read."""

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import glob_translate
from huggingface_hub import HfApi

from ..errors import DataError, SourceUnavailable, one_line, public_logger, without_secrets
from ..files import local_path, missing_path, read_json
from ..keys.data_keys import SourceKeys
from .builders import from_builder, load_builder, locate_shards, split_shards, warn_outside
from .kinds import IMAGE_EXTENSIONS, KINDS, PACKED, Endings, ending, kind_of
from .listing import LINK_TO_FILE, LeftOut, Listing, list_folder, shown
from .place import Place, common_folder, without_query
from .remote import is_remote, with_retries
from .splits import find_splits, folders_like_splits, like_split

logger = public_logger(__name__)


def locate(keys: SourceKeys) -> Place:
    """Find a data set. Tries in this order: the built-in digits, a URL, a local path, the Hub.

    Raises:
        DataError: if nothing has this name, it holds no images, or the command would write its output into it.
        SourceUnavailable: if the network failed at every try.
    """
    _check_outputs(keys)
    place = _locate(keys.dataset, keys.dataset_config, keys.dataset_revision)
    place = replace(place, name=without_secrets(keys.dataset), image_column=keys.image_column)
    return replace(place, label_column=keys.label_column, labels=keys.labels)


def _check_outputs(keys: SourceKeys) -> None:
    """Refuse to write into a folder that images are read from: what a run draws would become its training images."""
    for source in filter(None, (keys.dataset, getattr(keys, "eval_dataset", None))):
        root = local_path(source)
        root = root if os.path.exists(root) else root.partition("**")[0]
        for flag in ("output_dir", "output"):
            written = getattr(keys, flag, None)
            if written and os.path.isdir(root) and Path(os.path.realpath(root)) in _with_parents(local_path(written)):
                message = f"{flag} {written} lies inside the data set {source}, and would be read as part of it"
                raise DataError(f"{message}; name a place outside")


def _with_parents(path: str) -> list[Path]:
    real = Path(os.path.realpath(path))
    return [real, *real.parents]


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
    if files := _matches(path):
        return _locate_files(dataset, files)
    if os.path.exists(path):
        raise DataError(f"{dataset} is not a regular file or folder; name a file or folder of images")
    if glob.has_magic(dataset):
        raise DataError(f"there is no file or folder {dataset}: nothing matches the pattern; check it")
    if missing := missing_path(dataset, (*KINDS, *PACKED)):
        raise DataError(missing)
    try:
        return _locate_on_hub(dataset, dataset, config_name, revision)
    except SourceUnavailable as error:
        raise SourceUnavailable(f"{error}; no local file or folder is called {dataset} either") from error


def _matches(path: str) -> list[str]:
    """The local files that a path or pattern means. What exists under the very name is not taken for a pattern."""
    if os.path.exists(path):
        return [path] if os.path.isfile(path) else []
    patterns, found = _expand_braces(path), []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found.append(pattern)
        elif len(patterns) > 1 and not glob.has_magic(pattern):
            raise DataError(f"there is no file or folder {pattern}; check the numbers in the pattern")
        elif "**" in pattern:
            found += _matches_below(pattern)
        else:
            found += sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
    return found


def _matches_below(pattern: str) -> list[str]:
    """The files that a pattern with ** matches. `glob` would follow links in circles."""
    root = os.path.dirname(pattern.partition("**")[0])
    if glob.has_magic(root):
        raise DataError(f"{pattern} has other wildcards before **; give the folder instead")
    matches = re.compile(glob_translate(pattern)).match
    listing = list_folder(root or ".")
    _warn_left_out(root or ".", listing.left_out)
    return [file for file in (os.path.join(root, name) for name in listing.names) if matches(file)]


def _warn_left_out(dataset: str, *left_out: LeftOut) -> None:
    if any(left_out):
        logger.warning("%s: left out: %s", dataset, ", ".join(str(part) for part in left_out if part))


def _expand_braces(pattern: str) -> list[str]:
    """`a-{008..010}` -> a-008, a-009, a-010."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    before, after, width = pattern[: match.start()], pattern[match.end() :], len(match[1])
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [expanded for number in numbers for expanded in _expand_braces(f"{before}{number:0{width}}{after}")]


def _locate_folder(dataset: str, path: str, config_name: str | None) -> Place:
    index = Path(path, "dataset_dict.json")
    if index.is_file():
        return Place(dataset, "disk", {split: [] for split in _saved_splits(index)}, path, described=index.name)
    if all(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "state.json")):
        return Place(dataset, "disk", {"train": []}, root=path)
    listing = list_folder(path)
    endings = Endings(listing.names)
    kind = endings.kind()
    if kind is None:
        _warn_left_out(dataset, listing.left_out)
        raise _no_images(dataset, endings)
    place = _place_of_folder(dataset, path, config_name, listing, endings, kind)
    images = kind == "parquet" and place.kind == "imagefolder"  # a few parquet files beside more images
    _warn_left_out(dataset, listing.left_out, endings.others("imagefolder" if images else kind))
    return place


def _place_of_folder(
    dataset: str, path: str, config_name: str | None, listing: Listing, endings: Endings, kind: str
) -> Place:
    if kind == "imagefolder":
        return _locate_images(dataset, path, endings, listing.same_file)
    names = endings.of_kind(kind)
    # An absolute path, because a relative one may be the name of a builder of `datasets`, such as `text`.
    root = os.path.abspath(path)
    pattern = glob.escape(root) != root  # `datasets` would take this path for one
    if kind == "archive":
        return split_shards(Place(dataset, "imagefolder", {"train": names}, path))
    if pattern:
        if any(os.path.isfile(os.path.join(root, name)) for name in ("README.md", "dataset_infos.json")):
            logger.warning("%s: its README is not read, as the path has one of * ? [; rename the folder", dataset)
        return locate_shards(dataset, root, kind)
    builder = load_builder(dataset, root, name=config_name)
    place = from_builder(dataset, builder)
    if place.kind == "imagefolder":
        return _locate_images(dataset, path, endings, listing.same_file)
    if len(builder.builder_configs) < 2:
        real = {os.path.realpath(file) for files in place.splits.values() for file in files}
        outside = [name for name in names if os.path.realpath(os.path.join(root, name)) not in real]
        warn_outside(dataset, place.splits, outside)
    return place


def _no_images(dataset: str, endings: Endings) -> DataError:
    message = f"no images in {dataset}; expected files ending in {' '.join(IMAGE_EXTENSIONS)}"
    if others := endings.others(None):
        message = f"no images that can be read in {dataset}: it holds {others}; convert images to JPEG, PNG or TIFF"
        message += ", and unpack archives"
    return DataError(message)


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


def _locate_images(dataset: str, root: str, endings: Endings, same_file: Sequence[list[str]] = ()) -> Place:
    names = endings.of_kind("imagefolder")
    splits, level = find_splits(names)
    if level is None:
        if alike := folders_like_splits(names):
            message = (
                "%s has no folders called train, validation or test, so all its images are one split, although some "
                "folders look like splits (%s); rename them, or choose one with --split"
            )
            logger.warning(message, dataset, ", ".join(map(shown, alike[:5])))
        splits = {"train": names}
    else:
        warn_outside(dataset, splits, sorted(set(names).difference(*splits.values())))
    left_out = LeftOut()
    for split, files in splits.items() if same_file else ():
        present = set(files)
        again = {name for group in same_file for name in [name for name in group if name in present][1:]}
        if again:
            left_out.add(LINK_TO_FILE, min(again), len(again))
            splits[split] = [name for name in files if name not in again]
    _warn_left_out(dataset, left_out)
    return Place(dataset, "imagefolder", splits, root, level, metadata=endings.metadata)


def _locate_files(dataset: str, files: list[str]) -> Place:
    """Single files form one split, `train`."""
    kinds = {kind_of(file, is_remote(file)) for file in files}
    kind = next(iter(kinds))
    if len(kinds) > 1 or kind is None:
        endings = sorted({ending(file, is_remote(file)) or "(no ending)" for file in files})
        remedy = "give one kind: .parquet, .tar, .arrow, .zip or images"
        if any(file.lower().endswith(PACKED) for file in files):
            remedy += ", and unpack archives of other kinds"
        raise DataError(f"{dataset} matches {' '.join(endings)} files; {remedy}")
    alike = Counter(filter(None, (like_split(posixpath.basename(file)) for file in files)))
    if len(alike) > 1 and kind != "imagefolder":
        found = ", ".join(f"{count} {split}" for split, count in alike.items())
        logger.warning("%s is read as one split, although its files are called %s; name those of one", dataset, found)
    if kind not in ("imagefolder", "archive"):
        return Place(dataset, kind, {"train": files})
    root = common_folder(list(map(without_query, files))) or ("" if files[0].startswith("/") else ".")
    names = [file.removeprefix(f"{root}/") for file in files]
    if kind == "imagefolder" and (alike := folders_like_splits(names)):
        logger.warning(
            "%s is read as one split, although some of its folders look like splits: %s; name those of one",
            *(dataset, ", ".join(map(shown, alike[:5]))),
        )
    return Place(dataset, "imagefolder", {"train": names}, root)


def _locate_url(dataset: str) -> Place:
    files: list[str] = []
    for pattern in _expand_braces(dataset):
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
        except (ImportError, ValueError) as error:
            raise DataError(f"cannot open {pattern}: {one_line(error)}") from error
        found = with_retries(lambda fs=fs, path=path: fs.glob(path), dataset) if glob.has_magic(path) else []
        if found or (glob.has_magic(path) and not with_retries(lambda fs=fs, path=path: fs.exists(path), dataset)):
            files += [fs.unstrip_protocol(file) for file in found]
        elif kind_of(path, of_url=True):
            files.append(pattern)
        else:
            return _locate_url_folder(dataset, fs, path)
    if not files:
        raise DataError(f"nothing matches {dataset}; check the pattern")
    return _locate_files(dataset, sorted(files))


def _locate_url_folder(dataset: str, fs: Any, path: str) -> Place:
    root = fs.unstrip_protocol(path).rstrip("/")
    urls = [fs.unstrip_protocol(file) for file in with_retries(lambda: fs.find(path), dataset)]
    names = (url.removeprefix(f"{root}/") for url in urls)
    endings = Endings((name for name in names if not name.startswith(".") and "/." not in name), of_url=True)
    kind = endings.kind()
    if kind is None:
        raise _no_images(dataset, endings)
    _warn_left_out(dataset, endings.others(kind))
    if kind == "imagefolder":
        return _locate_images(dataset, root, endings)
    if kind == "archive":
        return split_shards(Place(dataset, "imagefolder", {"train": endings.of_kind(kind)}, root))
    return locate_shards(dataset, root, kind)


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
    return from_builder(dataset, load_builder(dataset, repo, name=config_name, revision=revision))

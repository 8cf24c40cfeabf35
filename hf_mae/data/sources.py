"""A data set that was found -> the rows of its splits, undecoded.

`locate.py` finds a data set once. Here each of its splits gets a reader. It reads the files in place if that is cheap
or the user asks for it; otherwise it reads a table that `datasets` makes and maps.
"""

import glob
import hashlib
import os
from dataclasses import replace
from typing import Any

import fsspec
import numpy as np

from ..errors import DataError, one_line, public_logger
from ..files import plain_name
from ..keys.data_keys import DataKeys, SplitKeys
from ..keys.finetune_keys import Problem
from .builders import load_builder
from .kinds import PACKED
from .label_files import attach
from .labels import class_groups, leave_out_empty
from .listing import shown
from .locate import locate
from .order import HELD_OUT, Rows
from .place import Place, short_names, without_query
from .remote import is_remote, with_retries
from .shards import ArraySource, FileSource, Source, in_threads
from .splits import SPLIT_FOLDERS, class_folders, folder_of, split_named, strays
from .tars import TarSource

logger = public_logger(__name__)

LARGE_TABLE, MOST_GROWTH = 2**30, 20  # bytes; a table on the disk that is larger and this many times its files


def open_source(dataset: str, *, streaming: bool | None = None, **keys: Any) -> Source:
    """Find a data set and get ready to read one split of it, such as `open_source("digits")`.

    Args:
        dataset: name of the data set, see `DataKeys`.
        streaming: True reads files in place, False downloads and maps them; None streams what is remote.
        **keys: other keys of `DataKeys`, such as `split="test"`.

    Raises:
        DataError: as from `locate` and `open_split`.
    """
    named = DataKeys(dataset=dataset, **keys)
    return open_split(locate(named), named.split, streaming)


def open_splits(
    keys: SplitKeys, streaming: bool | None = None, labelled: bool = False, problem: Problem | None = None
) -> tuple[Rows, Rows, str]:
    """Open the rows to learn from and those to evaluate on.

    Without `eval_dataset` and `eval_split`, the evaluation split is found by its name. A data set that has none gets a
    held-out part, and so does one for which `eval_fraction` is given. Errors are those of `locate` and `open_split`.

    Args:
        keys: the data.
        streaming: as for `open_split`, for `dataset` alone.
        labelled: whether to leave out the images that a table of labels doesn't list.
        problem: hold out a part of each class, for labels of this kind. When omitted, a part of all rows, chosen by
            the hash of their place alone: then evaluations of frozen features use rows that pretraining, which knows
            no labels, held out too.

    Returns:
        Rows to learn from, rows to evaluate on, and a description of the latter.
    """
    place = locate(keys)
    source = open_split(place, keys.split, streaming)
    if labelled:
        leave_out_empty(source, problem)
    if keys.eval_dataset:
        evaluation = open_split(locate(keys.evaluation_source()), keys.eval_split or "train")
    elif name := keys.eval_split or _evaluation_split(place, keys):
        evaluation = open_split(place, name, streaming)
    else:
        return _hold_out(source, keys, labelled, problem)
    if labelled:
        leave_out_empty(evaluation, problem)
    rows = Rows(source, max_samples=keys.max_samples, labelled=labelled)
    eval_rows = Rows(evaluation, max_samples=keys.max_eval_samples, labelled=labelled)
    return rows, eval_rows, eval_rows.name


def _evaluation_split(place: Place, keys: SplitKeys) -> str | None:
    if keys.eval_fraction is not None:
        return None
    names = SPLIT_FOLDERS["validation"] + SPLIT_FOLDERS["test"]
    return next((name for name in names if name in place.splits and name != keys.split), None)


def _hold_out(source: Source, keys: SplitKeys, labelled: bool, problem: Problem | None) -> tuple[Rows, Rows, str]:
    groups = None if problem is None else class_groups(source, problem)
    share = HELD_OUT if keys.eval_fraction is None else keys.eval_fraction
    rows = Rows(source, "train", share, keys.max_samples, labelled, groups)
    eval_rows = Rows(source, "held_out", share, keys.max_eval_samples, labelled, groups)
    what = keys.split if problem in (None, "regression") else f"each class of {keys.split}"
    return rows, eval_rows, f"{100 * share:g}% of {what}, held out by a hash of each row's place"


def open_split(place: Place, split: str, streaming: bool | None = None) -> Source:
    """Get ready to read the rows of a split.

    `streaming` True reads files in place, False downloads and maps them; None streams what is remote.

    Raises:
        DataError: if there is no such split, a package is missing, or the files can't be read.
        SourceUnavailable: if the network failed on every try.
    """
    place, split = _with_split(place, split)
    source = _open(place, split, streaming)
    source.splits_from = place.splits_from
    return source


def _open(place: Place, split: str, streaming: bool | None) -> Source:
    if place.labels and (place.kind != "imagefolder" or _must_map(place, split, streaming)):
        message = f"--labels names files of images, but {place.name} is {place.kind} data that is not read file by file"
        raise DataError(f"{message}; give a folder of images")
    if place.kind == "digits":
        return _digits()
    if place.kind == "disk":
        return _open_saved(place, split)
    if _must_map(place, split, streaming):
        try:
            return _open_mapped(place, split, streaming)
        except DataError as error:
            missing_package = isinstance(error.__cause__, ImportError)
            if place.kind != "parquet" or streaming is not None or missing_package:
                raise
            # `datasets` makes no table from a file with a corrupt page. Reading in place loses only that page's rows.
            logger.warning("%s; meanwhile they are read in place", error)
    if place.kind == "imagefolder":
        return _open_images(place, split)
    if place.kind == "parquet":
        return _open_parquet(place, split)
    source = TarSource(place, split)
    source.fingerprint = _fingerprint(place, source)
    return source


def _with_split(place: Place, split: str) -> tuple[Place, str]:
    """The name under which the data has a split: "val" and "validation" mean the same, and a folder may be a split."""
    if split in place.splits:
        return place, split
    aliases = [name for name in place.splits if split_named(name) == (split_named(split) or "")]
    if len(aliases) == 1:
        return place, aliases[0]
    if place.kind == "imagefolder" and place.split_level is None:
        files = [name for name in place.splits.get("train", []) if name.startswith(f"{split}/")]
        if files:
            return replace(place, splits={split: files}, split_level=split.count("/")), split
    raise DataError(f"{place.name} has no split {split!r}; choose one of: {', '.join(place.splits)}")


def _must_map(place: Place, split: str, streaming: bool | None) -> bool:
    """Whether rows come from a table that `datasets` makes, not from the files where they are."""
    readable = place.kind in ("parquet", "webdataset", "imagefolder")
    archives = any(file.lower().endswith(PACKED) for file in place.splits[split])
    if not readable or archives:
        if streaming:
            raise DataError(f"{place.name} is {place.kind} data that is not read in place; leave streaming unset")
        if place.remote:
            logger.warning("%s is %s data that is not read in place: it is downloaded first", place.name, place.kind)
        return True
    if place.remote:
        return streaming is False
    return place.kind == "parquet" and not streaming


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the built-in digits need scikit-learn: pip install 'hf-mae[train]'") from error
    digits: Any = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, :, :, None]  # values 0..16
    source = ArraySource("digits", images, digits.target, [str(name) for name in digits.target_names])
    source.labels_from = "scikit-learn"
    return source


def _open_images(place: Place, split: str) -> Source:
    given = attach(place, split)
    if given is None:
        names, labels, class_names = _class_labels(place, split)
    else:
        names, labels, class_names = place.splits[split], given.values, given.names
    files = {}
    if place.revision is None:
        sizes = _sizes([f"{place.root}/{name}" for name in names])
        # A digest: the list itself would be in every checkpoint, and may have millions of files.
        start = len(f"{place.root}/")
        paths = [without_query(f"{place.root}/{name}")[start:] for name in names]  # a signature may change
        listing = "\n".join(f"{size or 0} {path}" for path, size in zip(paths, sizes, strict=True))
        digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
        files = {"count": len(names), "bytes": sum(size or 0 for size in sizes), "sha256": digest}
    source = FileSource(place, split, names, labels)
    source.label_names = None if class_names is None else list(map(plain_name, class_names))
    source.fingerprint = _fingerprint(place, source, files)
    if given is None:
        source.labels_from = None if labels is None else "class folders"
    else:
        source.labels_from, source.label_remedy = given.origin, given.remedy
        if not given.unlisted.all():  # without any label, the first use of labels says what to do
            source.unlisted = given.unlisted
        source.fingerprint["labels"] = given.digest
    return source


def _class_labels(place: Place, split: str) -> tuple[list[str], np.ndarray | None, list[str] | None]:
    """The files of a split, and their class indices and class names if it has class folders.

    A few files outside of these are left out.
    """
    if place.label_column not in (None, "label"):
        message = f"{place.name} is a folder of images, its labels are its class folders, not {place.label_column!r}"
        raise DataError(f"{message}; leave out --label_column")
    names = place.splits[split]
    classes = class_folders((name for files in place.splits.values() for name in files), place.split_level)
    outside, few = strays(names, classes)
    if outside and 2 * len(outside) < len(names):
        message = "%s: images of split %s that are in none of its class folders: %d (first %s); %s"
        effect = "they are left out" if few else "no image has a label"
        logger.warning(message, place.name, split, len(outside), shown(outside[0]), effect)
    if not few:
        return names, None, None
    left_out = set(outside)
    names = [name for name in names if name not in left_out] if outside else names
    class_names = sorted(set(classes.values()))
    number = {name: i for i, name in enumerate(class_names)}
    return names, np.array([number[classes[folder_of(name)]] for name in names], dtype=np.int64), class_names


def _open_parquet(place: Place, split: str) -> Source:
    from .parquet import ParquetSource

    source = ParquetSource(place, split)
    files = [list(file) for file in zip(source.shard_names, source.file_sizes, strict=True)]
    source.fingerprint = _fingerprint(place, source, files)
    return source


def _open_saved(place: Place, split: str) -> Source:
    import datasets

    from .parquet import ArrowSource

    try:
        loaded: Any = datasets.load_from_disk(place.root)
    except Exception as error:  # any, for files that are corrupt
        raise DataError(f"cannot read {place.name}: {one_line(error)}; save it again") from error
    table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    source = ArrowSource(place, split, table)
    files = [file["filename"] for file in table.cache_files]
    sizes = [[os.path.basename(file), os.path.getsize(file)] for file in files]
    source.fingerprint = _fingerprint(place, source, sizes)
    return source


def _open_mapped(place: Place, split: str, streaming: bool | None) -> Source:
    builder = place.builder
    if builder is None:
        files = map(glob.escape, _without_queries(place, place.urls(split)))
        builder = load_builder(place.name, place.kind, data_files={split: list(files)})
    if place.kind == "imagefolder" and any(file.lower().endswith(PACKED) for file in place.splits[split]):
        # `datasets` 5.2 takes the archive's own folder for the class of each of its files, and then refuses it.
        logger.warning("%s: class folders inside archives are not read as labels; unpack them to use these", place.name)
        builder.config.drop_labels = True
    if place.kind == "parquet" and not place.remote and not os.path.isdir(builder.cache_dir):
        builder.config.batch_size = _rows_to_map(place, split, streaming)
    # A user may have copied part of a data set, with the README that counts the rows of all of it.
    checks = "basic_checks" if place.remote else "no_checks"
    try:
        with_retries(lambda: builder.download_and_prepare(verification_mode=checks), place.name)
        table = builder.as_dataset(split=split)
    except DataError:
        raise
    except Exception as error:  # `datasets` lets the exceptions of many libraries through
        cause = error.__cause__ or error
        message = f"cannot read {place.name}: {type(cause).__name__}: {one_line(cause)}"
        raise DataError(f"{message}; check its files") from error
    from .parquet import ArrowSource  # after load_builder, which says so if a package is missing

    own_files = "imagefolder" in (builder.name, builder.info.builder_name)
    source = ArrowSource(place, split, table, follow_paths=own_files)
    source.fingerprint = _fingerprint(place, source) | {"kind": f"{place.kind}, mapped"}
    return source


def _without_queries(place: Place, urls: list[str]) -> list[str]:
    """The files, downloaded if they have queries: `datasets` would take a URL's question mark for a wildcard."""
    if all(without_query(url) == url for url in urls):
        return urls
    import datasets

    return with_retries(lambda: datasets.DownloadManager().download(urls), place.name)


def _rows_to_map(place: Place, split: str, streaming: bool | None) -> int:
    """The number of rows of parquet files to copy into a table at once; a DataError if it would fill the disk."""
    from .parquet import BLOCK_BYTES, largest_table

    # `datasets` also copies the other splits that it found.
    urls = [url for part in (place.splits if place.builder else [split]) for url in place.urls(part)]
    total, row = largest_table(urls)
    stored = sum(map(os.path.getsize, urls))
    if streaming is None and total > max(LARGE_TABLE, MOST_GROWTH * stored):
        message = f"a table of the {len(urls)} files of {place.name} may take {total / 2**30:.1f} GB"
        raise DataError(f"{message}, and they have {stored:,} bytes; write the images without repeating them")
    return max(1, BLOCK_BYTES // max(1, row))


def _fingerprint(place: Place, source: Source, files: Any = None) -> dict[str, Any]:
    """`Source.fingerprint`: the revision, or what `files` says of the files; their names and sizes when omitted."""
    facts: dict[str, Any] = {"kind": place.kind, "split": source.split, "rows": source.shard_sizes}
    if place.revision is not None:
        return facts | {"revision": place.revision}
    if files is None:
        urls = place.urls(source.split)
        files = [[name, size or 0] for name, size in zip(short_names(urls), _sizes(urls), strict=True)]
    return facts | {"files": files}


def _sizes(urls: list[str]) -> list[int | None]:
    # For local files, a call of `stat` costs less than handing it to a thread.
    return in_threads(_size, urls) if urls and is_remote(urls[0]) else [_size(url) for url in urls]


def _size(url: str) -> int | None:
    """Bytes of a file; None if a server doesn't say."""
    if not is_remote(url):
        try:
            return os.stat(url).st_size
        except OSError as error:
            raise DataError(f"cannot read {url}: {error.strerror}; it was there at the start") from error
    fs, path = fsspec.core.url_to_fs(url)
    return with_retries(lambda: fs.size(path), url)

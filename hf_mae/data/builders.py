"""Data sets whose files and splits `datasets` finds: shards, and repositories of the Hub."""

import glob
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..errors import DataError, one_line, public_logger
from .kinds import KINDS, METADATA_FILES, kind_of
from .listing import shown
from .place import Place, common_folder
from .remote import with_retries
from .splits import find_splits, like_split, splits_of_shards

logger = public_logger(__name__)


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


def from_builder(dataset: str, builder: Any) -> Place:
    data_files = builder.config.data_files or {str(split): [] for split in builder.info.splits or {}}
    splits = {str(split): list(dict.fromkeys(map(str, files))) for split, files in data_files.items()}
    revision = None if builder.repo_id is None else builder.hash
    # Only a README, or the Hub's description, names configurations.
    described = builder.DEFAULT_CONFIG_NAME is not None or len(builder.builder_configs) > 1
    place = Place(dataset, builder.name, splits, builder=builder, revision=revision)
    place.described = "its own description" if described else None
    if builder.name != "imagefolder":
        return split_shards(place)
    place.root = common_folder([file for files in splits.values() for file in files])
    for split, files in splits.items():
        tables = (name.removeprefix(f"{place.root}/") for name in files if posixpath.basename(name) in METADATA_FILES)
        place.metadata = list(dict.fromkeys([*place.metadata, *tables]))
        names = (file.removeprefix(f"{place.root}/") for file in files)
        splits[split] = [name for name in names if kind_of(name) in ("imagefolder", "archive")]
    found, place.split_level = find_splits([name for names in splits.values() for name in names])
    if len(found) > len(splits) == 1:
        return replace(place, splits=found, builder=None)
    folders = [common_folder(names) for names in splits.values()]
    if place.split_level is None and len(splits) > 1 and all(folders):
        # `datasets` also knows folders such as train_2019. A split with only one class folder has a longer path.
        place.split_level = min(folder.count("/") for folder in folders)
    return place


def locate_shards(dataset: str, root: str, kind: str) -> Place:
    """Shards below a folder or URL. Splits are read from names by the rules of `datasets`, as for any local folder."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(root)
    endings = [end for end, its_kind in KINDS.items() if its_kind == kind]
    patterns = with_retries(lambda: get_data_patterns(base), dataset)
    by_split = with_retries(
        lambda: DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=endings), dataset
    )
    splits = {str(split): list(dict.fromkeys(files)) for split, files in by_split.items() if files}
    return split_shards(Place(dataset, kind, splits, root))


def split_shards(place: Place) -> Place:
    """Find splits in the names of shards where `datasets` sees only one, as in `Train/` and `Test/`."""
    if len(place.splits) > 1:
        return place
    ((split, files),) = place.splits.items()
    folder = common_folder(files)
    by_name = {file.removeprefix(f"{folder}/"): file for file in files}
    splits = splits_of_shards(list(by_name))
    if not splits:
        alike = Counter(filter(None, (like_split(part) for name in by_name for part in name.split("/"))))
        if len(alike) > 1 or (alike and split not in alike):
            first = next(name for name in by_name if any(map(like_split, name.split("/"))))
            message = "%s is read as one split, %s, although some files look like other splits, such as %s"
            logger.warning(message, place.name, split, shown(first))
        return place
    warn_outside(place.name, splits, sorted(set(by_name).difference(*splits.values())))
    chosen = {split: [by_name[name] for name in names] for split, names in splits.items()}
    return replace(place, splits=chosen, described=None, builder=None)


def warn_outside(dataset: str, splits: Iterable[str], names: list[str]) -> None:
    if names:
        message = "%s has the splits %s; files outside of them are left out: %d, first %s"
        logger.warning(message, dataset, ", ".join(splits), len(names), shown(names[0]))

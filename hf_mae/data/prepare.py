"""`hf-mae prepare`: re-encode a data set once, at the size that training needs, as sharded parquet like the Hub's.

Each shard is a pure function of the source, the settings and its range of rows, and its footer records the source and
the settings. So an existing shard is known to be complete and right, and a run that is interrupted and started again
writes the same bytes as one that was never interrupted.

    DST/README.md                          what `datasets` and the Hub read: features, splits
    DST/data/train-00000-of-00012.parquet  image (bytes, and its key in the source), label
    DST/manifest.json                      settings; rows, bytes and sha256 of each shard; bad images by reason
    DST/bad_samples.jsonl                  split, key and reason of each image that was left out
"""

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import DataError, short
from ..files import sha256, write_bytes, write_json, write_text, writing
from ..image_processing_base_mae import resize_bands
from ..keys.data_keys import PrepareRecipe
from ..run_folder import RunFolder, write_lines
from .bands import Bands, bands_last, missing_as_nan, to_native
from .decode import load_image
from .labels import mixed_labels
from .limits import MAX_SIDE, BadImage, BadSample, as_bad_image
from .loader import check_bad, each_batch, ignore_termination
from .locate import locate
from .order import Rows
from .remote import reading
from .sources import open_split
from .transform import BICUBIC, size_of
from .understood import count_images, describe_data

ROW_GROUP = 100  # rows; streaming fetches this many at once
TYPE_ROWS = 100  # rows used to find the type of a label column whose rows have to be read


def prepare(recipe: PrepareRecipe) -> dict[str, Any]:
    """Write the data set that the recipe describes to its `output_dir`; finished shards that it holds are kept.

    Returns:
        The content of manifest.json.

    Raises:
        UserError: if a key is out of range, the data can't be read, or the folder can't be written or holds other data.
    """
    folder = Path(recipe.output_dir)
    place = locate(recipe)
    splits = [Rows(open_split(place, split)) for split in ([recipe.split] if recipe.split else place.splits)]
    print(describe_data(splits[0].source, list(map(count_images, splits))), flush=True)
    features = _find_features(splits)
    settings = {key: getattr(recipe, key) for key in ("shortest_edge", "quality", "nodata")}
    manifest: dict[str, Any] = {**settings, "splits": {}}
    bad: list[dict[str, str]] = []
    parts = [_Shards(rows, features, folder, recipe) for rows in splits]
    with writing(folder, "--output_dir"):
        _make_room(folder / "data", {name for shards in parts for name in shards.names})
    for shards in parts:
        name, records = shards.rows.source.split, _write_all(shards, recipe.num_workers)
        left_out = [sample for record in records for sample in record.pop("bad")]
        _check_bad(left_out, shards.rows, recipe)
        reasons = Counter(reason for _, reason in left_out)
        count = sum(record["rows"] for record in records)
        manifest["splits"][name] = {"rows": count, "bad": dict(sorted(reasons.items())), "shards": records}
        bad += [{"split": name, "key": key, "reason": reason} for key, reason in left_out]
    with writing(folder, "--output_dir"):
        write_lines(RunFolder(folder).bad_file, bad)
        write_text(folder / "README.md", _card(manifest, features, recipe.nodata_flag))
        write_json(folder / "manifest.json", manifest)
    return manifest


def _make_room(folder: Path, names: set[str]) -> None:
    """Create the folder of the shards, and check that it holds no other files: they would be read too."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name.startswith(".tmp-"):
            path.unlink(missing_ok=True)
        elif path.name not in names:
            raise DataError(f"{folder} holds {path.name} from another run; name another folder, or remove this one")


def _find_features(splits: list[Rows]) -> Any:
    """The `datasets.Features` of all splits: image, and label if any split has labels."""
    label_feature: dict[str, Any] = {}
    for rows in splits:
        names = rows.source.label_names
        known = rows.source.known_labels()
        first = [row.label for row in rows.read(rows.index[:TYPE_ROWS])] if known is None else known
        if names is not None:
            label = datasets.ClassLabel(names=names)
            label = datasets.List(label) if any(isinstance(value, list) for value in first) else label
        else:
            try:
                labels = pa.array(first)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise mixed_labels(rows, error) from error
            if labels.null_count == len(labels):
                continue
            label = datasets.Features.from_arrow_schema(pa.schema({"label": labels.type}))["label"]
        if label_feature.setdefault("label", label) != label:
            raise DataError(f"splits of {rows.source.name} have different labels; prepare them one by one with --split")
    return datasets.Features({"image": datasets.Image(), **label_feature})


def _check_bad(bad: list[BadSample], rows: Rows, recipe: PrepareRecipe) -> None:
    if bad:
        key, reason = bad[0]
        message = f"{len(bad)} of {len(rows)} images of {rows.name} can't be decoded (the first is {key}: {reason})"
        check_bad(len(bad), len(rows), recipe.max_bad_fraction, message)


# ------------------------------------------------------------------------------------------ an image


def reencode(
    data: bytes | np.ndarray | BadImage, shortest_edge: int, quality: int, nodata: float | None = None
) -> bytes:
    """Check that an image can be decoded, and reduce its shorter side to at most `shortest_edge` pixels.

    Encoded images that are small enough keep their bytes, and their EXIF orientation with them. Larger ones are turned
    upright. 8-bit colour (RGB, CMYK) and grey become JPEG. Images that JPEG can't hold (transparency, palettes, 16-bit
    grey) become PNG, which loses only resolution, and 16-bit colour becomes TIFF. Other TIFF files and arrays become
    `.npy` files.

    `quality` is that of JPEG. With `nodata`, pixels of this value aren't blended with others, and nothing becomes JPEG.
    `data` and errors are those of `decode_image`.
    """
    image = load_image(data, 2 * shortest_edge if nodata is None else MAX_SIDE)
    with as_bad_image():
        if isinstance(image, np.ndarray):
            image = _as_picture(_without_one_band_axis(image))
        pixels = image.pixels if isinstance(image, Bands) else image
        height, width = size_of(pixels)
        short = min(height, width)
        if short <= shortest_edge:
            return data if isinstance(data, bytes) else _encoded(pixels, None)
        size = round(height * shortest_edge / short), round(width * shortest_edge / short)
        if isinstance(image, Bands):
            return _encoded_bands(replace(image, pixels=_resize_array(to_native(image.pixels), size, nodata)))
        if isinstance(image, Image.Image) and image.mode.startswith(("F", "I")):
            # Mode I: Pillow gives 32 bits for 16-bit files that it has no 16-bit mode for.
            image = np.asarray(image) if image.mode == "F" else np.asarray(image).astype(np.uint16)
        if isinstance(image, np.ndarray):
            return _encoded(_as_picture(_resize_array(image, size, nodata)), None)
        plain = image.mode in ("L", "RGB", "CMYK") and not image.has_transparency_data
        kept = plain and (nodata is None or image.mode != "CMYK")  # PNG has no CMYK
        if not kept and image.mode not in ("LA", "RGBA"):
            # Resizing takes means, which palette indices and single bits can't represent.
            image = image.convert("RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB")
        if nodata is not None:
            return _encoded(Image.fromarray(_resize_array(np.asarray(image), size, nodata)), None)
        return _encoded(image.resize((size[1], size[0]), BICUBIC), quality if plain else None)


def _without_one_band_axis(array: np.ndarray) -> np.ndarray:
    """(H, W), (C, H, W) or (H, W, C) -> (H, W) for one band, (H, W, C) for more."""
    array = to_native(array)
    if array.ndim == 2:
        return array
    array = bands_last(array)
    return array[:, :, 0] if array.shape[-1] == 1 else array


def _as_picture(array: np.ndarray) -> Image.Image | np.ndarray:
    """Convert an array to a PIL image if PNG can hold it: one band, or 8-bit colour."""
    one_band = array.ndim == 2
    fits = array.dtype in ((np.uint8, np.uint16) if one_band else (np.uint8,)) and (one_band or array.shape[-1] == 3)
    return Image.fromarray(np.ascontiguousarray(array)) if fits else array


def _encoded_bands(image: Bands) -> bytes:
    """Encode without loss: a picture of several bands as TIFF, which says what they are."""
    if not (image.is_rgb or image.has_alpha):
        return _encoded(_as_picture(_without_one_band_axis(image.pixels)), None)
    if image.has_alpha and image.pixels.shape[-1] == 2:  # as RGBA, because Pillow can't read 16-bit grey with alpha
        image = Bands(image.with_channels(4), is_rgb=True, has_alpha=True)
    count = image.pixels.shape[-1] - (3 if image.is_rgb else 1)
    extra = ["unspecified"] * (count - image.has_alpha) + ["unassalpha"] * image.has_alpha
    stream = io.BytesIO()
    kind = "rgb" if image.is_rgb else "minisblack"
    options: Any = {"photometric": kind, "extrasamples": extra, "planarconfig": "contig", "compression": "zlib"}
    tifffile.imwrite(stream, image.pixels, metadata=None, software=False, **options)
    return stream.getvalue()


def _resize_array(array: np.ndarray, size: tuple[int, int], nodata: float | None) -> np.ndarray:
    """Resize an array to (height, width). Keeps its number of axes, its dtype except float64, and missing pixels.

    With `nodata`, every band stays in its range, and a resized pixel that would get this value gets the next one.
    """
    bands, whole = array if array.ndim == 3 else array[:, :, None], array.dtype.kind in "iu"
    bands = missing_as_nan(bands if bands.dtype in (np.uint8, np.uint16) else bands.astype(np.float32), nodata)
    resized = resize_bands(bands, size, BICUBIC)
    if nodata is not None or (whole and resized.dtype != array.dtype):
        low, high = np.nanmin(bands), np.nanmax(bands)
        resized = resized.clip(low, high)
        resized = resized.round() if whole else resized
        if nodata is not None:
            aside = high if nodata < high else low
            beside = nodata + np.sign(aside - nodata) if whole else np.nextafter(np.float32(nodata), aside)
            resized = np.where(np.isnan(resized), nodata, np.where(resized == nodata, beside, resized))
        resized = resized.astype(array.dtype if whole else np.float32)
    return resized if array.ndim == 3 else resized[:, :, 0]


def _encoded(image: Image.Image | np.ndarray, quality: int | None) -> bytes:
    """Encode as JPEG of this quality, or without loss if it is None."""
    stream = io.BytesIO()
    if isinstance(image, np.ndarray):
        np.save(stream, image, allow_pickle=False)
    elif quality is None:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------ shards


class _Shards(Dataset):
    """The shards of a split. Indexing writes a missing shard and returns a shard's entry in the manifest."""

    def __init__(self, rows: Rows, features: Any, folder: Path, recipe: PrepareRecipe):
        self.rows, self.features, self.folder, self.recipe = rows, features, folder, recipe
        count = -(-len(rows) // recipe.rows_per_shard)
        self.names = [f"{rows.source.split}-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
        source = json.dumps(rows.source.fingerprint, sort_keys=True).encode(errors="surrogateescape")
        settings = {key: getattr(recipe, key) for key in ("shortest_edge", "quality", "rows_per_shard", "nodata")}
        self.settings = {"source": hashlib.sha256(source).hexdigest(), **settings}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path = self.folder / "data" / self.names[number]
        with reading(path):
            bad = self._bad_of_finished(path)
        if bad is None:
            bad = self._write(path, number)
        with reading(path):
            facts = {"rows": pq.read_metadata(path).num_rows, "bytes": path.stat().st_size, "sha256": sha256(path)}
        return {"file": f"data/{path.name}", **facts, "bad": bad}

    def _bad_of_finished(self, path: Path) -> list[BadSample] | None:
        """The bad images of a finished shard; None if it has to be written."""
        try:
            text = pq.read_schema(path).metadata[b"hf_mae"]
        except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError):
            return None
        except OSError as error:
            if error.errno is None:  # Arrow's error for a broken footer
                return None
            raise
        remedy = "name another folder, or remove this one"
        try:
            record = json.loads(text)
            settings, bad = dict(record["settings"]), [(str(key), str(reason)) for key, reason in record["bad"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path} was not written by hf-mae prepare: its metadata can't be read; {remedy}"
            ) from error
        for key, value in self.settings.items():
            if settings.get(key) != value:
                what = "another source" if key == "source" else f"{key} {short(settings.get(key))}, not {value}"
                raise DataError(f"{path} was prepared with {what}; {remedy}")
        return bad

    def _write(self, path: Path, number: int) -> list[BadSample]:
        start = number * self.recipe.rows_per_shard
        index = self.rows.index[start : start + self.recipe.rows_per_shard]
        columns: dict[str, list[Any]] = {"image": [], "label": []}
        bad: list[BadSample] = []
        for row in self.rows.read(index):
            try:
                content = reencode(row.image, self.recipe.shortest_edge, self.recipe.quality, self.recipe.nodata)
            except BadImage as error:
                bad.append((row.key, error.reason))
                continue
            columns["image"].append({"bytes": content, "path": row.key})
            columns["label"].append(row.label)
        schema = self.features.arrow_schema
        try:
            table = pa.table([pa.array(columns[column.name], column.type) for column in schema], schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise mixed_labels(self.rows, error) from error
        record = json.dumps({"settings": self.settings, "bad": bad}).encode()
        table = table.replace_schema_metadata({**(schema.metadata or {}), b"hf_mae": record})
        stream = io.BytesIO()
        # The images are already compressed.
        pq.write_table(table, stream, row_group_size=ROW_GROUP, compression="none", write_page_checksum=True)
        with writing(path, "--output_dir"):
            write_bytes(path, stream.getbuffer())
        return bad


def _write_all(shards: _Shards, num_workers: int) -> list[dict[str, Any]]:
    """Write all shards. Returns their entries in the manifest, with the bad images."""
    ahead = 1 if num_workers else None
    loader = DataLoader(
        shards, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_termination, prefetch_factor=ahead
    )
    return list(tqdm(each_batch(loader), shards.rows.name, total=len(shards), unit="shard", disable=None))


def _card(manifest: dict[str, Any], features: Any, nodata_flag: str) -> str:
    """README.md: metadata for `datasets` and the Hub, and a few lines for readers."""
    splits = datasets.SplitDict()
    for name, split in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"])
        splits[name] = datasets.SplitInfo(name, num_bytes=size, num_examples=split["rows"])
    size = sum(split.num_bytes for split in splits.values())
    info = datasets.DatasetInfo(features=features, splits=splits, dataset_size=size, download_size=size)
    files = [{"split": name, "path": f"data/{name}-*"} for name in manifest["splits"]]
    data = DatasetCardData(configs=[{"config_name": "default", "data_files": files}])
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    table = "".join(
        f"| {name} | {split['rows']:,} | {len(split['shards'])} | {sum(split['bad'].values())} |\n"
        for name, split in manifest["splits"].items()
    )
    side = manifest["shortest_edge"]
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Images of {side} pixels\n\nRe-encoded by `hf-mae prepare "
        f"--shortest_edge {side} --quality {manifest['quality']}{nodata_flag}`: the shorter side is at most "
        f"{side} pixels; smaller images keep the source's bytes. The licence is the source's.\n\n"
        f"| split | images | shards | left out (can't be decoded) |\n|---|---|---|---|\n{table}\n"
        "`manifest.json` has the rows, bytes and sha256 of each shard; `bad_samples.jsonl` lists the left-out images.\n"
    )

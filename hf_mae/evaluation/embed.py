"""`hf-mae embed`: write features of any data source to a parquet or numpy file."""

import csv
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from ..data.decode import BadSample
from ..data.labels import labels_of, mixed_labels, named
from ..data.locate import locate
from ..data.order import Rows
from ..data.sources import open_split
from ..data.stats import probe_rows
from ..data.understood import announce_data
from ..errors import UserError
from ..files import replaced, writing
from ..keys.evaluation_keys import EmbedRecipe
from .encoder import FrozenEncoder
from .table import encoded_batches, even_batches, report_bad

Batches = Iterator[tuple[list[str], Any, np.ndarray]]  # keys, Arrow labels, features (n, D) or (n, N, D) float32


def embed(recipe: EmbedRecipe) -> dict[str, Any]:
    """Write the features of a split.

    The parquet file has the columns `key` (the image's place in the source), `label` (the name of its class, or the
    label as the source stores it; null without one) and `features`. The numpy file has only the features, (n, D) or
    (n, N, D) float32; the keys and labels of its rows are in the CSV file of the same name.

    Returns:
        `path`; `images`, the number written; `width`, the shape of one image's features.

    Raises:
        UserError: for anything a user can fix; one line with the remedy.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes would write one file; start only one process")
    encoder = FrozenEncoder(recipe.model, recipe.pooling, recipe.mixed_precision).to(accelerator.device)
    source = open_split(locate(recipe), recipe.split)
    rows = Rows(source, max_samples=recipe.max_samples)
    announce_data(probe_rows(rows, encoder.spec.num_channels), encoder.spec, rows)
    origin = {"model": recipe.model, "dataset": source.name, "split": source.split, "pooling": recipe.pooling}
    bad: list[BadSample] = []

    def written() -> Batches:
        # The first images of a list of labels may have none: their type is that of all.
        kind = None if source.unlisted is None else pa.array([named(label, source) for label in labels_of(rows)]).type
        batches = even_batches(rows, encoder.spec, recipe.batch_size, recipe.num_workers, accelerator, bar="features")
        for batch, values in encoded_batches(encoder, batches):
            bad.extend(batch.bad)
            if batch.keys:
                labels = pa.array([named(label, source) for label in batch.labels], kind)
                kind = labels.type
                yield batch.keys, labels, values.cpu().numpy()
        report_bad(rows, bad, recipe.max_bad_fraction)

    path = Path(recipe.output)
    try:
        with writing(path, "--output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            FEATURE_WRITERS[path.suffix.lower()](path, written(), origin)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise mixed_labels(rows, error) from error
    width = [encoder.spec.num_patches] if recipe.pooling == "patches" else []
    return {"path": str(path), "images": len(rows) - len(bad), "width": [*width, encoder.width]}


def write_parquet(path: Path, batches: Batches, origin: dict[str, Any]) -> None:
    """Write keys, labels and features; their origin goes into the file's metadata, under "hf_mae"."""
    with replaced(path) as temporary, ExitStack() as stack:
        writer = None
        for keys, labels, values in batches:
            features: Any = pa.array(values.ravel())
            for side in values.shape[:0:-1]:
                features = pa.FixedSizeListArray.from_arrays(features, side)
            if writer is None:
                fields = {"key": pa.string(), "label": labels.type, "features": features.type}
                schema = pa.schema(fields, metadata={"hf_mae": json.dumps(origin)})
                writer = stack.enter_context(pq.ParquetWriter(temporary, schema))
            columns = [pa.array(keys), labels, features]
            writer.write_table(pa.Table.from_arrays(columns, schema=writer.schema))


def write_numpy(path: Path, batches: Batches, origin: dict[str, Any]) -> None:
    """Write features to NAME.npy, their keys and labels to NAME.csv; neither can store the origin."""
    rows, width = 0, ()
    with (
        replaced(path.with_suffix(".csv")) as table,
        replaced(path) as array,
        table.open("w", newline="") as lines,
        array.open("wb") as file,
    ):
        writer = csv.writer(lines)
        writer.writerow(["key", "label"])
        for keys, labels, values in batches:
            if not rows:
                _write_header(file, values.shape)
            rows, width = rows + len(values), values.shape[1:]
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
            texts = ("; ".join(map(str, label)) if isinstance(label, list) else label for label in labels.to_pylist())
            writer.writerows(zip(keys, texts, strict=True))
        # The new header has the same length: numpy leaves room in it for any number of rows.
        _write_header(file, (rows, *width))


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


FEATURE_WRITERS = {".parquet": write_parquet, ".npy": write_numpy}

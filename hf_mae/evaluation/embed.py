"""`hf-mae embed`: features of any data source, to a parquet or a numpy file."""

import csv
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from ..data.locate import locate
from ..data.order import Rows
from ..data.sources import open_split
from ..errors import UserError
from ..keys.evaluation_keys import EmbedRecipe
from .encoder import FrozenEncoder
from .table import encoded_batches, report_bad


def embed(recipe: EmbedRecipe) -> dict[str, Any]:
    """Write the features of a split.

    The parquet file has the columns `key` (the image's place in the source), `label` (as the source has it; absent
    where it has none) and `features`. The numpy file has the features alone, (n, D) or (n, N, D) float32; keys and
    labels of its rows are in the CSV file of the same name.

    Returns:
        `path`; `images` that were written; `width`, the shape of one image's features.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """
    recipe.check()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes would write one file; start hf-mae embed once")
    encoder = FrozenEncoder(recipe.model, recipe.pooling, recipe.mixed_precision).to(accelerator.device)
    source = open_split(locate(recipe), recipe.split)
    rows = Rows(source, max_samples=recipe.max_samples)
    path, bad, images, width = Path(recipe.output), [], 0, []
    origin = {"model": recipe.model, "dataset": recipe.dataset, "split": source.split, "pooling": recipe.pooling}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(WRITERS[path.suffix](path, origin)) as writer:
            for batch, values in encoded_batches(
                encoder, rows, encoder.spec, recipe.batch_size, recipe.num_workers, accelerator, "features"
            ):
                bad += batch.bad
                images, width = images + len(batch.keys), list(values.shape[1:])
                if batch.keys:
                    writer.add(batch.keys, batch.labels, values.cpu().numpy())
            report_bad(images, rows, bad, recipe.max_bad_fraction)
            writer.finish()
    except (OSError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{path} can't be written: {' '.join(str(error).split())[:300]}") from error
    return {"path": str(path), "images": images, "width": width}


class ParquetWriter:
    """Writes batches of features to a parquet file, which is there when it is whole.

    Args:
        path: of the file.
        origin: where the features come from; in the file's metadata, under "hf_mae".
    """

    def __init__(self, path: Path, origin: dict[str, Any]):
        self.path, self.temporary, self.origin = path, path.with_name(f".tmp-{path.name}"), origin
        self.writer: pq.ParquetWriter | None = None

    def add(self, keys: list[str], labels: list[Any], values: np.ndarray) -> None:
        """Append rows; values are (n, D) or (n, N, D) float32."""
        features: Any = pa.array(values.ravel())
        for side in values.shape[:0:-1]:
            features = pa.FixedSizeListArray.from_arrays(features, side)
        if self.writer is None:
            fields = {"key": pa.string(), "label": pa.array(labels).type, "features": features.type}
            schema = pa.schema(fields, metadata={"hf_mae": json.dumps(self.origin)})
            self.writer = pq.ParquetWriter(self.temporary, schema)
        columns = [pa.array(keys), pa.array(labels, self.writer.schema.field("label").type), features]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.writer.schema))

    def finish(self) -> None:
        """The file is whole."""
        assert self.writer is not None
        self.writer.close()
        self.temporary.replace(self.path)

    def close(self) -> None:
        """Leave nothing behind of a file that isn't."""
        if self.writer is not None:
            self.writer.close()
        self.temporary.unlink(missing_ok=True)


class NumpyWriter:
    """Writes batches of features to NAME.npy, their keys and labels to NAME.csv; both are there when they are whole.

    Args:
        path: NAME.npy.
        origin: not kept; the format has no place for it.
    """

    def __init__(self, path: Path, origin: dict[str, Any]):
        self.paths = [path, path.with_suffix(".csv")]
        self.temporary = [path.with_name(f".tmp-{path.name}") for path in self.paths]
        self.file, self.table = self.temporary[0].open("wb"), self.temporary[1].open("w", newline="")
        self.rows, self.width = 0, ()
        self.csv = csv.writer(self.table)
        self.csv.writerow(["key", "label"])

    def add(self, keys: list[str], labels: list[Any], values: np.ndarray) -> None:
        """Append rows; values are (n, D) or (n, N, D) float32."""
        if not self.rows:
            self.width = values.shape[1:]
            self._write_header()
        self.rows += len(values)
        self.file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        self.csv.writerows(zip(keys, labels, strict=True))

    def _write_header(self) -> None:
        # Numpy leaves room in it for any number of rows, so that it can be written again at the end.
        self.file.seek(0)
        shape = (self.rows, *self.width)
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def finish(self) -> None:
        """The files are whole."""
        self._write_header()
        self.close(keep=True)
        for temporary, path in zip(self.temporary, self.paths, strict=True):
            temporary.replace(path)

    def close(self, keep: bool = False) -> None:
        """Leave nothing behind of files that aren't."""
        self.file.close()
        self.table.close()
        for temporary in () if keep else self.temporary:
            temporary.unlink(missing_ok=True)


WRITERS: dict[str, Any] = {".parquet": ParquetWriter, ".npy": NumpyWriter}

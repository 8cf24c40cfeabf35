import numpy as np
import pytest

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from image_sets import NAMES, check_images, image_table, png, read_all, splits_of, upload, write_files, write_parquet

from hf_mae.data import remote
from hf_mae.data.decode import BadImage, decode_image
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.mark.parametrize("streaming", [None, True])
def test_local_parquet_is_mapped_by_default_and_read_in_place_if_asked(tmp_path, streaming):
    folder = write_parquet(tmp_path / "d" / "data")
    write_parquet(folder, "test", range(60, 70), files=1)
    assert splits_of(tmp_path / "d") == ["train", "test"]
    for name in (tmp_path / "d", folder / "train-*.parquet", folder / "train-{00000..00001}-of-00002.parquet"):
        source = open_source(str(name), streaming=streaming)
        assert source.label_names == NAMES
        assert source.random_access is (streaming is None)
        assert len(source.blocks) == (6 if streaming else 1)
        check_images(source, range(50))
    check_images(open_source(f"file://{folder}/test-00000-of-00001.parquet", streaming=streaming), range(60, 70))
    check_images(open_source(str(tmp_path / "d"), split="test", streaming=streaming), range(60, 70))


def test_rows_come_in_the_order_asked_for_and_a_block_is_fetched_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "d", files=1)
    for streaming in (None, True):
        source = open_source(str(tmp_path / "d"), streaming=streaming)
        assert [row.image for row in source.read(0, [19, 10, 15])] == [png(19), png(10), png(15)]
        assert source.read(0, []) == []
    opened = []
    monkeypatch.setattr("hf_mae.data.parquet.open_bytes", lambda url: opened.append(url) or remote.open_bytes(url))
    for row in range(20, 30):
        source.read(0, [row])
    assert len(opened) == 1


@pytest.mark.parametrize("form", ["dataset", "dict"])
def test_what_save_to_disk_wrote_is_read(tmp_path, form):
    table = image_table(range(30)).select(range(29, -1, -1))
    (table if form == "dataset" else datasets.DatasetDict(train=table, dev=table)).save_to_disk(tmp_path / "d")
    assert splits_of(tmp_path / "d") == (["train"] if form == "dataset" else ["train", "dev"])
    source = open_source(str(tmp_path / "d"))
    assert (source.label_names, source.random_access) == (NAMES, True)
    check_images(source, range(29, -1, -1))


def test_a_url_of_parquet_is_streamed_with_the_splits_that_its_names_say(tmp_path):
    write_parquet(tmp_path / "d" / "data")
    write_parquet(tmp_path / "d" / "data", "validation", range(60, 70), files=1)
    url = upload(tmp_path / "d")
    assert splits_of(url) == ["train", "validation"]
    for name in (url, f"{url}/data/train-*.parquet", f"{url}/data/train-{{00000..00001}}-of-00002.parquet"):
        source = open_source(name)
        assert (source.random_access, source.label_names) == (False, NAMES)
        assert source.shard_names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
        check_images(source, range(50))
    check_images(open_source(url, split="validation"), range(60, 70))
    check_images(open_source(url, streaming=False), range(50))


def array_tables():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 5, 3), dtype=np.uint8)
    fixed = datasets.Features({"pixels": datasets.Array3D((4, 5, 3), "uint8"), "cls": datasets.Value("int64")})
    gray = datasets.Features({"pixels": datasets.Array2D((4, 5), "float32"), "cls": datasets.Value("int64")})
    lists = datasets.Features({"pixels": [[[datasets.Value("uint16")]]], "cls": datasets.Value("int64")})
    return [(pixels, fixed), (pixels[..., 0].astype(np.float32) / 7, gray), (pixels.astype(np.uint16), lists)]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("streaming", [None, True])
def test_columns_of_numbers_come_as_arrays_in_their_own_dtype(tmp_path, case, streaming):
    pixels, features = array_tables()[case]
    table = datasets.Dataset.from_dict({"pixels": pixels.tolist(), "cls": list(range(6))}, features=features)
    table.to_parquet(tmp_path / "a.parquet", batch_size=4)
    rows = read_all(open_source(str(tmp_path / "a.parquet"), streaming=streaming))
    for row, wanted in zip(rows, pixels, strict=True):
        assert row.image.dtype == wanted.dtype
        assert np.array_equal(row.image, wanted)
    assert [row.label for row in rows] == list(range(6))


# ------------------------------------------------------------------------------------------ columns


def write_table(tmp_path, columns: dict):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


@pytest.mark.parametrize("streaming", [None, True])
def test_a_binary_column_holds_images_where_none_has_their_type(tmp_path, streaming):
    path = write_table(tmp_path, {"id": ["a", "b"], "jpg": [png(0), png(1)], "labels": ["x", "y"]})
    assert [(row.image, row.label) for row in read_all(open_source(path, streaming=streaming))] == [
        (png(0), "x"),
        (png(1), "y"),
    ]
    with pytest.raises(DataError, match=r"column 'id' of .* holds Value.*, which is not an image"):
        open_source(path, streaming=streaming, image_column="id")


def test_an_unclear_or_missing_image_column_lists_the_columns(tmp_path):
    path = write_table(tmp_path, {"left": [png(0)], "right": [png(1)], "label": [1]})
    with pytest.raises(DataError, match=r"several columns of images \(left, right\).* --image_column NAME"):
        open_source(path)
    assert read_all(open_source(path, image_column="right"))[0].image == png(1)
    with pytest.raises(
        DataError, match="no column 'rihgt' for --image_column; did you mean 'right'\\? its columns: left"
    ):
        open_source(path, image_column="rihgt")
    with pytest.raises(DataError, match="no column 'nothing' for --label_column; its columns"):
        open_source(path, image_column="left", label_column="nothing")
    path = write_table(tmp_path, {"text": ["a"], "numbers": [[1, 2]]})
    with pytest.raises(DataError, match="no column of images among text, numbers; choose one with --image_column"):
        open_source(path)


def test_of_two_classes_the_usual_name_is_the_label(tmp_path):
    classes = {name: datasets.ClassLabel(names=NAMES) for name in ("coarse_label", "fine_label")}
    features = datasets.Features({"image": datasets.Image(), **classes})
    rows = {"image": [{"bytes": png(0), "path": None}], "coarse_label": [0], "fine_label": [2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert read_all(open_source(path))[0].label == 2
    assert read_all(open_source(path, label_column="coarse_label"))[0].label == 0


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_in_the_data_is_not_followed(tmp_path, streaming, in_bucket):
    secret = write_files(tmp_path, {"secret.png": png(7)}) / "secret.png"
    rows = [{"bytes": None, "path": str(secret)}, {"bytes": png(1), "path": str(secret)}, None]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": pa.array(rows)}, features.arrow_schema), tmp_path / "d" / "a.parquet")
    source = open_source(upload(tmp_path / "d") if in_bucket else str(tmp_path / "d"), streaming=streaming)
    first, second, third = read_all(source)
    assert second.image == png(1)
    assert first.image.reason == third.image.reason == "NoBytes"
    with pytest.raises(BadImage, match=r"no image bytes \(if it has a path, it is not followed"):
        decode_image(first.image, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_numbers_that_make_no_array_are_bad_rows(tmp_path, streaming):
    whole, ragged, gap = [[1, 2], [3, 4]], [[1, 2], [3]], [[1, None], [3, 4]]
    features = datasets.Features({"pixels": [[datasets.Value("uint8")]]})
    table = datasets.Dataset.from_dict({"pixels": [whole, ragged, gap, [], None]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    first, *others = read_all(open_source(str(tmp_path / "a.parquet"), streaming=streaming))
    assert first.image.tolist() == whole
    assert [row.image.reason for row in others] == ["RaggedArray"] * 3 + ["NoBytes"]


# ------------------------------------------------------------------------------------------ damage


def damage_row_group(path, group, column=0):
    """Overwrite the pages of a column."""
    found = pq.read_metadata(path).row_group(group).column(column)
    with open(path, "r+b") as file:
        file.seek(found.data_page_offset)
        file.write(b"\xff" * found.total_compressed_size)


@pytest.mark.parametrize("in_bucket", [False, True])
def test_a_corrupt_row_group_costs_its_own_rows_only(tmp_path, caplog, monkeypatch, in_bucket):
    folder = write_parquet(tmp_path / "d", files=1)
    damage_row_group(folder / "train-00000-of-00001.parquet", 2)
    source = open_source(upload(folder) if in_bucket else str(folder), streaming=True)
    opened = []
    monkeypatch.setattr("hf_mae.data.parquet.open_bytes", lambda url: opened.append(url) or remote.open_bytes(url))
    rows = read_all(source)
    for number, row in enumerate(rows):
        assert row.image.reason == "CorruptRowGroup" if 20 <= number < 30 else row.image == png(number)
    assert caplog.text.count("row group 2 of train-00000-of-00001.parquet is corrupt") == 1
    assert len(opened) == (6 if in_bucket else 5)  # a transfer may have corrupted it: fetched once more


def test_local_parquet_with_a_corrupt_page_is_read_in_place_for_its_other_rows(tmp_path, caplog):
    folder = write_parquet(tmp_path / "d", files=1)
    damage_row_group(folder / "train-00000-of-00001.parquet", 2)
    rows = read_all(open_source(str(folder)))
    assert [row.row for row in rows if isinstance(row.image, BadImage)] == list(range(20, 30))
    assert "they are read in place" in caplog.text
    with pytest.raises(DataError, match="cannot read"):
        open_source(str(folder), streaming=False)


def test_a_row_group_that_the_network_corrupted_is_fetched_again_and_loses_nothing(tmp_path, monkeypatch):
    source = open_source(upload(write_parquet(tmp_path / "d", files=1)))
    fetch, corrupted = remote.RemoteFile._fetch, []

    def corrupt_once(self, start, stop):
        data = fetch(self, start, stop)
        if corrupted:
            return data
        corrupted.append((start, stop))
        return bytes(len(data))

    monkeypatch.setattr(remote.RemoteFile, "_fetch", corrupt_once)
    check_images(source, range(50))
    assert corrupted


def test_a_flipped_bit_in_a_page_with_a_checksum_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(i) for i in range(3)]}), path, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.find(png(1)) + 60] ^= 1
    path.write_bytes(content)
    assert {row.image.reason for row in read_all(open_source(str(path), streaming=True))} == {"CorruptRowGroup"}


@pytest.mark.parametrize("streaming", [True, None])
def test_parquet_that_says_rubbish_of_its_columns_is_named(tmp_path, streaming):
    table = pa.table({"image": [png(0)]}).replace_schema_metadata({"huggingface": b'{"info": {"feat\xff'})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the column types in a\.parquet are corrupt .*; fetch it again"):
        open_source(str(tmp_path / "a.parquet"), streaming=streaming)


@pytest.mark.parametrize("flipped", ["offset", "length"])
def test_a_saved_table_with_a_flipped_bit_is_an_error_before_it_ends_the_process(tmp_path, flipped):
    image_table(range(30)).save_to_disk(tmp_path / "d")
    (path,) = (tmp_path / "d").glob("*.arrow")
    content = bytearray(path.read_bytes())
    sizes = np.cumsum([0] + [len(png(i)) for i in range(30)]).astype("<i4").tobytes()
    at = content.find(sizes)
    assert at > 0
    content[at + (40 if flipped == "offset" else 4 * 30) + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"the table of .* is corrupt .*; create it again"):
        open_source(str(tmp_path / "d"))


def test_labels_that_are_no_text_make_a_row_group_corrupt(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"image": [png(i) for i in range(3)], "label": ["a", "marked", "c"]}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False)
    content = bytearray(path.read_bytes())
    content[content.find(b"marked") + 1] = 0xFF
    path.write_bytes(content)
    assert {row.image.reason for row in read_all(open_source(str(path), streaming=True))} == {"CorruptRowGroup"}

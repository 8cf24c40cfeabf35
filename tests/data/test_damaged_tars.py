"""Tars with any damage: samples before it are read, one bad row stands for the rest; no endless loop, no memory."""

import io
import os
import tarfile
import tracemalloc
from typing import Any

import pytest

pytest.importorskip("datasets")
from image_sets import png, read_all, samples, upload, write_files, write_tar

from hf_mae.data.sources import open_source
from hf_mae.errors import DataError

WHOLE = 3  # samples before the damage


def header(name="00003.png", size=0, kind=tarfile.REGTYPE, raw_size: bytes | None = None, **fields: bytes) -> bytearray:
    """A header of old GNU format; `raw_size` are the 12 bytes of its size, `at483` and so on bytes at an offset."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if raw_size is not None:
        block[124:136] = raw_size
    for place, content in fields.items():
        block[int(place[2:]) : int(place[2:]) + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def base256(number: int) -> bytes:
    sign = b"\xff" if number < 0 else b"\x80"
    return sign + (number % 256**11).to_bytes(11, "big")


def extended(content: bytes, kind=tarfile.XHDTYPE) -> bytes:
    """An extended header, padded, before a member of 100 bytes."""
    padded = content + bytes(-len(content) % 512)
    return bytes(header("pax", len(content), kind)) + padded + bytes(header(size=100)) + bytes(512)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + 2
    return b"%d" % (length + (length > 99)) + text


DAMAGES = {
    "size of -512, back to its own header": header(raw_size=base256(-512)),
    "size of -1": header(raw_size=base256(-1)),
    "most negative size": header(raw_size=b"\xff" + bytes(11)),
    "size of 8 GB in octal": header(raw_size=b"77777777777\0"),
    "size beyond 64 bits": header(raw_size=b"\x80" + b"\xff" * 11),
    "size that is no number": header(raw_size=b"no number\0\0\0"),
    "negative size in octal": header(raw_size=b"-0000001000\0"),
    "wrong checksum": header()[:148] + b"000001\0 " + header()[156:] + header(),
    "negative size of a folder": header("folder/", kind=tarfile.DIRTYPE, raw_size=base256(-1024)),
    "extended header of negative size": header(kind=tarfile.XHDTYPE, raw_size=base256(-512)),
    "extended header of 10 GB": header(kind=tarfile.XHDTYPE, raw_size=base256(10**10)),
    "extended header says size -512": extended(record("size", "-512")),
    "extended header says size of 40 digits": extended(record("size", "9" * 40)),
    "extended header says size 1e30": extended(record("size", "1e30")),
    "extended header whose record has length 0": extended(b"0 size=1\n"),
    "extended header whose record is longer than it": extended(b"99999 size=1\n"),
    "extended header of digits": extended(b"1" * 600),
    "long name of 10 GB": header("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, raw_size=base256(10**10)),
    "long name of negative size": header("././@LongLink", kind=tarfile.GNUTYPE_LONGNAME, raw_size=base256(-1)),
    "long name at the end": header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + bytes([97]) * 512,
    "long names without end": (header("././@LongLink", 512, tarfile.GNUTYPE_LONGNAME) + bytes([97]) * 512) * 2000,
    "sparse member without its map": header(kind=tarfile.GNUTYPE_SPARSE, at482=b"\1"),
    "sparse member of 10 GB": header(kind=tarfile.GNUTYPE_SPARSE, raw_size=base256(10**10)),
    "member that is cut off": header(size=10**6) + bytes(600),
    "header that is cut off": header()[:100],
    "noise": bytes(range(1, 256)) * 10,
}


@pytest.fixture
def open_measured(own_caches):
    """Opens a source; reading its headers takes less than 8 MB."""

    def opened(name):
        tracemalloc.start()
        try:
            source = open_source(str(name))
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        finally:
            tracemalloc.stop()
        return source

    return opened


def damaged(path, damage: bytes, after: bytes = b""):
    """A tar of whole samples, then the damage, then `after`."""
    write_tar(path, samples(range(WHOLE)))
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 for member in tar.getmembers())
    os.truncate(path, end)
    path.write_bytes(path.read_bytes() + damage + after)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_damaged_tar_keeps_what_precedes_and_has_one_bad_row(tmp_path, open_measured, caplog, damage, where):
    path = damaged(tmp_path / "d" / "a.tar", bytes(DAMAGES[damage]), b"\1" * 100)
    name = path if where == "disk" else f"{upload(path.parent)}/a.tar"
    last: Any
    *whole, last = read_all(open_measured(name))
    assert [(row.image, row.label) for row in whole] == [(png(i), i) for i in range(WHOLE)]
    assert (last.key, last.image.reason) == (f"a.tar#{WHOLE}", "TruncatedTar")
    assert caplog.text.count("ends early") == 1


def test_sparse_members_and_headers_about_the_next_one_are_read_past(tmp_path, open_measured):
    long_name = "folder/" + "n" * 200 + ".png"
    members = [
        header("s.png", 512, tarfile.GNUTYPE_SPARSE, at482=b"\1", at483=b"77777777777\0") + bytes(1024),
        extended(record("GNU.sparse.major", "1") + record("GNU.sparse.realsize", "99")),
        header("././@LongLink", len(long_name) + 1, tarfile.GNUTYPE_LONGNAME) + long_name.encode(),
        header("cut", len(png(7))) + png(7),
    ]
    members = b"".join(bytes(member) + bytes(-len(member) % 512) for member in members)
    path = damaged(tmp_path / "a.tar", members, bytes(1024))
    assert [row.image for row in read_all(open_measured(path))] == [png(0), png(1), png(2), png(7)]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_each_format_give_what_tarfile_gives(tmp_path, form):
    names = ["a.png", "f/" + "b" * 90 + ".png", "\u00e9/\u4e2d.png", "g/" * 40 + "h" * 60 + ".png", "c.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "x" * 600}) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(png(number)), 1.5
            tar.addfile(info, io.BytesIO(png(number)))
            link = tarfile.TarInfo(f"{name}.link")
            link.type, link.linkname = tarfile.SYMTYPE, "x" * 99
            tar.addfile(link)
    assert [row.image for row in read_all(open_source(str(tmp_path / "a.tar")))] == [png(i) for i in range(5)]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"rubbish" * 1000, b"\x1f\x8b" * 512], ids=["empty", "x", "text", "gzip"]
)
def test_a_file_that_is_no_tar_is_one_bad_row_among_tars_and_an_error_alone(tmp_path, own_caches, caplog, content):
    write_files(tmp_path / "d", {"a.tar": content})
    with pytest.raises(DataError, match=r"a\.tar is not an uncompressed tar"):
        open_source(str(tmp_path / "d" / "a.tar"))
    write_tar(tmp_path / "d" / "b.tar", samples(range(3)))
    first: Any
    first, *others = read_all(open_source(str(tmp_path / "d"), label_column="cls"))
    assert (first.key, first.image.reason) == ("a.tar#0", "TruncatedTar")
    assert [row.image for row in others] == [png(i) for i in range(3)]
    assert caplog.text.count("a.tar is not an uncompressed tar") == 1

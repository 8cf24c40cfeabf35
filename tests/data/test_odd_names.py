"""Names of files that aren't UTF-8, or have line ends: keys and labels are plain text on one line."""

import os

import pytest

pytest.importorskip("datasets")
from image_sets import png, write_tar

from hf_mae.data.sources import open_source
from hf_mae.files import plain_name


def test_a_plain_name_is_one_line_of_text():
    assert plain_name("a\udcff\nb\x1b[0m\x85\u2028é 中.png") == "a\\udcff\\nb\\x1b[0m\\x85\\u2028é 中.png"


def test_keys_and_class_names_are_text_whatever_the_bytes_of_file_names(tmp_path):
    for folder in (b"c\xff", b"d\n"):
        os.makedirs(os.fsencode(tmp_path) + b"/i/" + folder)
        with open(os.fsencode(tmp_path) + b"/i/" + folder + b"/a\xfe.png", "wb") as file:
            file.write(png(1))
    source = open_source(str(tmp_path / "i"))
    assert [row.key for row in source.read(0, [0, 1])] == ["c\\udcff/a\\udcfe.png", "d\\n/a\\udcfe.png"]
    assert source.label_names == ["c\\udcff", "d\\n"]


def test_a_tar_and_its_members_may_have_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"t\xff.tar")
    write_tar(
        tmp_path / name, [(os.fsdecode(b"m\xff.png"), png(1)), (os.fsdecode(b"m\xff.json"), b'{"label": "\\udcff"}')]
    )
    (row,) = open_source(str(tmp_path / name)).read(0, [0])
    assert (row.key, row.image, row.label) == ("t\\udcff.tar#0", png(1), "\\udcff")

"""Every command on two data sets that number, name or store the same classes differently."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from runs import start
from tiny import save_model

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = 12
DATA = ["--num_workers", 0, "--results"]
PAPER = ["--protocol", "paper", "--total_batch_size", 24, "--epochs", 1, "--warmup_epochs", 0]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A model, class folders 0..11, and the same images in tables whose labels are numbers, texts and named classes."""
    root = tmp_path_factory.mktemp("twins")
    save_model(root / "model", channels=3)
    rng = np.random.default_rng(0)
    files, labels = [], []
    for label in range(CLASSES):
        for number in range(4):
            path = root / "folders" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
            files.append(path.read_bytes())
            labels.append(label)
    (root / "listed").mkdir()
    for i, file in enumerate(files):
        (root / "listed" / f"{i}.png").write_bytes(file)
    lines = ["file_name,label", *(f"{i}.png,{label}" for i, label in enumerate(labels))]
    (root / "listed" / "metadata.csv").write_text("\n".join(lines))
    names = [str(label) for label in reversed(range(CLASSES))]
    kinds = {
        "numbers": (labels, datasets.Value("int64")),
        "floats": (labels, datasets.Value("float32")),
        "texts": ([str(label) for label in labels], datasets.Value("string")),
        "named": ([names.index(str(label)) for label in labels], datasets.ClassLabel(names=names)),
    }
    for name, (values, feature) in kinds.items():
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        table = {"image": [{"bytes": file, "path": None} for file in files], "label": values}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(root / f"{name}.parquet"))
    return root


def figures(twins, tmp_path, command, train, test, *words):
    result = tmp_path / "results.json"
    data = ["--model", twins / "model", "--dataset", twins / train, "--eval_dataset", twins / test]
    assert start("evaluate", command, *data, *DATA, result, *words) == 0
    return json.loads(result.read_text())[-1]["figures"]


@pytest.mark.parametrize("data", ["numbers.parquet", "floats.parquet", "texts.parquet", "named.parquet", "listed"])
def test_knn_finds_each_image_in_its_own_class(twins, tmp_path, data):
    for train, test in (("folders", data), (data, "folders")):
        assert figures(twins, tmp_path, "knn", train, test, "--k", 1) == {"knn_top1_k1": 100}


@pytest.mark.parametrize("words", [[], PAPER])
def test_a_linear_probe_scores_the_same_images_the_same(twins, tmp_path, words):
    expected = figures(twins, tmp_path, "linear-probe", "folders", "folders", *words)
    for kind in ("numbers", "named"):
        assert figures(twins, tmp_path, "linear-probe", "folders", f"{kind}.parquet", *words) == expected


def test_embed_writes_the_labels_of_a_list(twins, tmp_path):
    (tmp_path / "list.csv").write_text("file,a,b,c\n11/3.png,1,0,1\n11/2.png,0,0,0\n")
    data = ["--dataset", twins / "folders", "--labels", tmp_path / "list.csv", "--label_column", "a,b,c"]
    words = ["embed", "--model", twins / "model", *data, "--num_workers", 0, "--per_device_batch_size", 2]
    expected = {"11/3.png": ["a", "c"], "11/2.png": []}
    assert start(*words, "--output", tmp_path / "f.parquet") == 0
    table = pq.read_table(tmp_path / "f.parquet")
    found = dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == {**dict.fromkeys(found), **expected}
    assert start(*words, "--output", tmp_path / "f.npy") == 0
    with (tmp_path / "f.csv").open() as file:
        texts = {row["key"]: row["label"] for row in csv.DictReader(file)}
    assert texts == {**dict.fromkeys(found, ""), "11/3.png": "a; c"}


def test_embed_writes_names(twins, tmp_path):
    for data in ("folders", "named.parquet"):
        words = ["--model", twins / "model", "--dataset", twins / data, "--output", tmp_path / "features.npy"]
        assert start("embed", *words, "--num_workers", 0) == 0
        with (tmp_path / "features.csv").open() as file:
            found = [row["label"] for row in csv.DictReader(file)]
        assert sorted(found) == sorted(4 * [str(label) for label in range(CLASSES)])
        if data == "named.parquet":
            assert found == [str(label) for label in range(CLASSES) for _ in range(4)]

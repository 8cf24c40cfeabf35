"""Data sets of the Hub read by `open_source`, from a server on this machine.

A process that imports huggingface_hub and datasets costs seconds, so each of the processes below does many jobs,
and several tests look at what it printed.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image
from runs import REPOSITORY

pytest.importorskip("datasets")

# Prints the results of a list of jobs, each {dataset, and keywords of open_source, ...}:
#   fail_open, fail_read  arguments of `HubServer.fail_next`, in force while opening, while reading
#   only                  number of the one block that is read
#   located               the names of the splits alone
#   both                  opens a training and an evaluation split, and counts the builders that this takes
#   processes             "fork" or "spawn": the blocks are read by two processes
CHILD = """
import functools, hashlib, json, multiprocessing, os, sys, urllib.request
from unittest import mock

import datasets
from huggingface_hub import utils
from hf_mae.data import locate, remote, sources
from hf_mae.keys.data_keys import DataKeys, SplitKeys

# No retries but our own, and no pauses. The defaults are changed because modules hold the functions by name.
for backoff in (utils.http_backoff, utils.http_stream_backoff.__wrapped__):
    backoff.__kwdefaults__["max_retries"] = 0
remote.RETRY_FIRST_DELAY = 0.01


def fail_next(**arguments):
    body = json.dumps(arguments).encode()
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/_fail", data=body).close()


def read_block(source, block):
    shard, start, stop = block
    rows = source.read(shard, range(start, stop))
    return [(row.shard, row.row, row.key, hashlib.sha256(row.image).hexdigest(), row.label) for row in rows]


def do(dataset, fail_open=None, fail_read=None, only=None, processes=None, **keywords):
    if fail_open or fail_read:
        fail_next(**(fail_open or {"n": 0}))
    if keywords.pop("located", False):
        return {"splits": list(locate.locate(DataKeys(dataset=dataset, **keywords)).splits)}
    if keywords.pop("both", False):
        with mock.patch.object(datasets, "load_dataset_builder", wraps=datasets.load_dataset_builder) as builders:
            rows, eval_rows, evaluated_on = sources.open_splits(SplitKeys(dataset=dataset, **keywords))
        return {"builders": builders.call_count, "rows": [len(rows), len(eval_rows)], "evaluated_on": evaluated_on}
    source = sources.open_source(dataset, **keywords)
    if fail_open or fail_read:
        fail_next(**(fail_read or {"n": 0}))
    read = functools.partial(read_block, source)
    blocks = source.blocks if only is None else source.blocks[only : only + 1]
    if processes:
        read(blocks[0])  # so that the parent has open connections
        with multiprocessing.get_context(processes).Pool(2) as pool:
            parts = pool.map(read, blocks, chunksize=1)
    else:
        parts = list(map(read, blocks))
    return {
        "rows": [row for part in parts for row in part],
        "shard_sizes": source.shard_sizes,
        "blocks": source.blocks,
        "random_access": source.random_access,
        "label_names": source.label_names,
        "fingerprint": source.fingerprint,
    }


if __name__ == "__main__":
    results = []
    for job in json.load(sys.stdin):
        try:
            results.append(do(**job))
        except remote.DataError as error:
            results.append({"error": type(error).__name__, "message": str(error)})
    print(json.dumps(results))
"""

OLD_CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
---
"""
CARD = """---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: small/train-*}
  - {split: test, path: small/test-*}
- config_name: large
  data_files:
  - {split: train, path: large/train-*}
---
"""
LABELS = ["cat", "dog"]
GROUP = 4  # rows in a row group

Sample = tuple[bytes, int]  # the encoded image, its class


def samples(first: int, count: int, side: int = 8) -> list[Sample]:
    """Different noise for each number, so that an image tells which row it is."""
    result = []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        result.append((file.getvalue(), number % 2))
    return result


def write_parquet(path: Path, rows: list[Sample]) -> list[Sample]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=LABELS)}).arrow_schema
    columns = {"image": [{"bytes": image} for image, _ in rows], "label": [label for _, label in rows]}
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=GROUP)
    return rows


def write_tar(path: Path, rows: list[Sample]) -> list[Sample]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(rows):
            for extension, content in (("png", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{path.stem}-{number:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return rows


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The server's folder, and for each split in it the samples of each shard."""
    root = tmp_path_factory.mktemp("hub")
    user = root / "datasets" / "user"
    expected: dict[str, list[list[Sample]]] = {}
    small, old = user / "pictures" / "small", user / "pictures.rev" / "v1.0" / "small"
    expected["train"] = [write_parquet(small / f"train-{i}.parquet", samples(20 * i, 10 - i)) for i in range(3)]
    expected["test"] = [write_parquet(small / "test-0.parquet", samples(100, 5))]
    expected["old train"] = [write_parquet(old / "train-0.parquet", samples(300, 6))]
    # Larger than the 64 KiB that pyarrow reads for a footer.
    large = user / "pictures" / "large" / "train-0.parquet"
    expected["large"] = [write_parquet(large, samples(200, 4 * GROUP, side=96))]
    (user / "pictures" / "README.md").write_text(CARD)
    (user / "pictures.rev" / "v1.0" / "README.md").write_text(OLD_CARD)
    tars = user / "tars" / "data"
    expected["tars"] = [write_tar(tars / f"train-{i}.tar", samples(400 + 20 * i, 7)) for i in range(2)]
    images = samples(500, 9)
    expected["folder"] = [sorted(images, key=lambda sample: sample[1])]  # files come in the order of their paths
    for number, (image, label) in enumerate(images):
        path = user / "folder" / "train" / LABELS[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    expected["listed"] = [samples(600, 5)]
    listed = user / "listed" / "train"
    listed.mkdir(parents=True)
    lines = ["file_name,label"]
    for number, (image, label) in enumerate(expected["listed"][0]):
        (listed / f"{number}.png").write_bytes(image)
        lines.append(f"{number}.png,{label}")
    (listed / "metadata.csv").write_text("\n".join(lines))
    return root, expected


def run(hub: HubServer, jobs: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Results of the jobs, all done by one new process."""
    # A file, which spawned processes can import. Under the command's name hf_mae leaves out its registration with
    # transformers, which takes longer than all jobs.
    script = tmp_path / "hf-mae.py"
    script.write_text(CHILD)
    env = hub.env | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], input=json.dumps(list(jobs.values())), env=env, text=True,
                          stdout=subprocess.PIPE, timeout=120)  # fmt: skip
    assert done.returncode == 0
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


def assert_rows_are(result: dict[str, Any], shards: list[list[Sample]]) -> None:
    """Every row once, at its place, with the same bytes."""
    assert result.get("error") is None, result
    assert result["shard_sizes"] == [len(shard) for shard in shards]
    found = {(shard, row): (digest, label) for shard, row, _, digest, label in result["rows"]}
    assert len(found) == len(result["rows"])
    assert found == {
        (i, row): (hashlib.sha256(image).hexdigest(), label)
        for i, shard in enumerate(shards)
        for row, (image, label) in enumerate(shard)
    }
    keys = [row[2] for row in result["rows"]]
    assert len(set(keys)) == len(keys)


PICTURES = {"dataset": "user/pictures"}
JOBS = {
    "train": PICTURES,
    "test": PICTURES | {"split": "test"},
    "old train": PICTURES | {"dataset_revision": "v1.0"},
    "by url": {"dataset": "hf://datasets/user/pictures@v1.0"},
    "splits": PICTURES | {"located": True},
    "splits of large": PICTURES | {"located": True, "dataset_config": "large"},
    "both": PICTURES | {"both": True},
    "tars": {"dataset": "user/tars"},
    "folder": {"dataset": "user/folder"},
    "listed": {"dataset": "user/listed"},
    "no repository": {"dataset": "user/nothing"},
    "no config": PICTURES | {"dataset_config": "lage"},
    "no split": PICTURES | {"split": "tset"},
    "no revision": PICTURES | {"dataset_revision": "v9"},
    "large, one block": PICTURES | {"dataset_config": "large", "only": 2},
}


@pytest.fixture(scope="module")
def streamed(repositories, tmp_path_factory):
    """Results of JOBS, the requests made for them, and the sizes of the files left in HF_HOME."""
    with HubServer(repositories[0]) as hub:
        results = run(hub, JOBS, tmp_path_factory.mktemp("streamed"))
        sizes = {str(path): path.stat().st_size for path in hub.home.rglob("*") if path.is_file()}
    return results, hub.requests, sizes


@pytest.mark.parametrize("name", ["train", "test", "old train", "tars", "folder", "listed"])
def test_every_row_comes_once_with_its_bytes_and_label(repositories, streamed, name):
    assert_rows_are(streamed[0][name], repositories[1][name])


def test_parquet_is_read_in_blocks_of_a_row_group(streamed):
    result = streamed[0]["train"]
    assert not result["random_access"]
    assert result["blocks"] == [[0, 0, 4], [0, 4, 8], [0, 8, 10], [1, 0, 4], [1, 4, 8], [1, 8, 9], [2, 0, 4], [2, 4, 8]]


def test_the_names_of_the_classes_come_with_the_rows(streamed):
    assert streamed[0]["train"]["label_names"] == LABELS
    assert streamed[0]["folder"]["label_names"] == LABELS


def test_a_revision_in_the_url_is_the_revision_by_flag(streamed):
    assert streamed[0]["by url"]["rows"] == streamed[0]["old train"]["rows"]


def test_the_fingerprint_tells_revisions_and_splits_apart_and_knows_the_commit(streamed):
    names = ("train", "test", "old train", "large, one block")
    prints = {json.dumps(streamed[0][name]["fingerprint"], sort_keys=True) for name in names}
    assert len(prints) == len(names)
    commits = {request.path.split("/")[5] for request in streamed[1] if request.path.endswith("small/train-0.parquet")}
    assert len(commits) == 2
    assert all(len(commit) == 40 for commit in commits)
    assert any(commit in json.dumps(streamed[0]["train"]["fingerprint"]) for commit in commits)


def test_the_splits_are_those_of_the_configuration(streamed):
    assert streamed[0]["splits"]["splits"] == ["train", "test"]
    assert streamed[0]["splits of large"]["splits"] == ["train"]


def test_training_and_evaluation_split_take_one_builder(streamed):
    expected = {"builders": 1, "rows": [27, 5], "evaluated_on": "split test of user/pictures"}
    assert streamed[0]["both"] == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no repository", ["user/nothing"]),
        ("no config", ["lage", "large"]),
        ("no split", ["tset", "test"]),
        ("no revision", ["v9"]),
    ],
)
def test_what_is_not_there_is_an_error_of_one_line_that_names_it(streamed, name, words):
    result = streamed[0][name]
    assert result["error"] == "DataError", result
    assert "\n" not in result["message"]
    assert all(word in result["message"] for word in words), result["message"]


def test_no_parquet_file_is_asked_for_as_a_whole_or_stored(streamed):
    gets = [request for request in streamed[1] if request.method == "GET" and request.path.endswith(".parquet")]
    assert gets
    assert {request.status for request in gets} == {206}
    assert max(streamed[2].values()) < 4096, streamed[2]


def test_reading_one_block_fetches_about_that_block(repositories, streamed):
    """A 64 KiB footer, and one row group of four."""
    result = streamed[0]["large, one block"]
    assert [row[1] for row in result["rows"]] == [8, 9, 10, 11]
    ranges = [
        request.range for request in streamed[1] if request.path.endswith("large/train-0.parquet") and request.range
    ]
    spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in ranges]
    fetched = sum(last - first + 1 for first, last in spans)
    assert fetched < 0.5 * sum(len(image) for image, _ in repositories[1]["large"][0]), ranges
    assert len(ranges) <= 4


FAULTS = {
    "503 twice": PICTURES | {"fail_read": {"n": 2, "suffix": ".parquet"}},
    "503 twice at the start": PICTURES | {"fail_open": {"n": 2, "suffix": ".parquet"}},
    "503 twice for the card": PICTURES | {"fail_open": {"n": 2, "suffix": "README.md"}, "dataset_revision": "v1.0"},
    "cut twice": PICTURES | {"fail_read": {"n": 2, "status": None, "suffix": ".parquet"}},
    "429 for a tar": {"dataset": "user/tars", "fail_read": {"n": 2, "status": 429, "suffix": ".tar"}},
    "a cut image": {"dataset": "user/folder", "fail_read": {"n": 2, "status": None, "suffix": ".png"}},
    "503 for ever": PICTURES | {"fail_read": {"n": 1000, "suffix": ".parquet"}},
    "cut for ever": PICTURES | {"fail_read": {"n": 1000, "status": None, "suffix": ".parquet"}},
    "503 for ever at the start": PICTURES | {"fail_open": {"n": 1000, "suffix": ".parquet"}},
    "503 for ever for an image": {"dataset": "user/folder", "fail_read": {"n": 1000, "suffix": ".png"}},
    "404": PICTURES | {"fail_read": {"n": 1000, "status": 404, "suffix": ".parquet"}},
}


@pytest.fixture(scope="module")
def faults(repositories, tmp_path_factory):
    """Results of FAULTS, and the requests made for them."""
    with HubServer(repositories[0]) as hub:
        return run(hub, FAULTS, tmp_path_factory.mktemp("faults")), hub.requests


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param("503 twice", "train", marks=pytest.mark.slow),
        ("503 twice at the start", "train"),
        ("503 twice for the card", "old train"),
        ("cut twice", "train"),
        ("429 for a tar", "tars"),
        ("a cut image", "folder"),
    ],
)
def test_a_fault_that_passes_costs_no_row(repositories, faults, name, split):
    assert_rows_are(faults[0][name], repositories[1][split])


def test_the_faults_did_happen(faults):
    statuses = Counter(request.status for request in faults[1] if request.method == "GET")
    assert statuses[503] >= 2 + 2 + 2 + 6 + 6 + 6
    assert statuses[None] >= 2 + 2 + 6
    assert statuses[429] == 2


@pytest.mark.parametrize("name", [name for name in FAULTS if "for ever" in name])
def test_a_fault_that_stays_is_source_unavailable_after_the_last_try(faults, name):
    result = faults[0][name]
    assert result.get("error") == "SourceUnavailable", result
    assert "6 tries" in result["message"]
    assert "\n" not in result["message"]


def test_a_file_that_is_gone_is_not_tried_again(faults):
    assert faults[0]["404"].get("error") == "DataError", faults[0]["404"]
    missing = [request for request in faults[1] if request.status == 404 and request.path.endswith(".parquet")]
    assert len(missing) == 1


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_the_same_rows(repositories, tmp_path, start):
    names = ["train", "tars", "folder"] if start == "fork" else ["train"]
    with HubServer(repositories[0]) as hub:
        results = run(hub, {name: JOBS[name] | {"processes": start} for name in names}, tmp_path)
    for name in names:
        assert_rows_are(results[name], repositories[1][name])


@pytest.mark.slow
def test_without_streaming_the_same_rows_come_from_one_local_table(repositories, tmp_path):
    jobs = {name: JOBS[name] for name in ("train", "old train", "folder")}
    with HubServer(repositories[0]) as hub:
        results = run(hub, {name: job | {"streaming": False} for name, job in jobs.items()}, tmp_path)
    for name, result in results.items():
        assert result.get("random_access"), result
        assert_rows_are(result, [[row for shard in repositories[1][name] for row in shard]])


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_source_unavailable(repositories, tmp_path):
    with HubServer(repositories[0]) as hub:
        pass
    result = run(hub, {"gone": PICTURES}, tmp_path)["gone"]
    assert result.get("error") == "SourceUnavailable", result
    assert "6 tries" in result["message"]
    assert "\n" not in result["message"]


@pytest.mark.slow
def test_the_clients_of_the_hub_find_what_they_ask_for(repositories, tmp_path):
    """That the server is a Hub to those who know nothing of it: none of our code takes part."""
    from transformers import ViTConfig, ViTModel

    root, expected = repositories
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    model.save_pretrained(root / "models" / "user" / "tiny")
    script = """
import datasets, fsspec, huggingface_hub, json, transformers
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = huggingface_hub.HfApi()

def error(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        return type(error).__name__

builder = datasets.load_dataset_builder("user/pictures", name="large")
splits = datasets.load_dataset("user/pictures", streaming=True)
with fsspec.open(builder.config.data_files["train"][0]) as file:
    file.seek(-4, 2)
    magic = file.read().decode()
print(json.dumps({
    "labels": {split: [row["label"] for row in rows] for split, rows in splits.items()},
    "old": len(list(datasets.load_dataset("user/pictures", revision="v1.0", split="train", streaming=True))),
    "magic": magic,
    "parameters": sum(p.numel() for p in transformers.AutoModel.from_pretrained("user/tiny").parameters()),
    "files": sorted(api.list_repo_files("user/tiny")),
    "card": open(huggingface_hub.hf_hub_download("user/pictures", "README.md", repo_type="dataset")).read(),
    "snapshot": huggingface_hub.snapshot_download("user/pictures", repo_type="dataset"),
    "user": api.whoami()["name"],
    "errors": [error(api.model_info, "user/none"), error(api.model_info, "user/tiny", revision="v9"),
               error(huggingface_hub.hf_hub_download, "user/tiny", "none.json")],
}))
"""
    with HubServer(root) as hub:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=hub.env, text=True, stdout=subprocess.PIPE, timeout=120, check=True)
        found = json.loads(done.stdout)
        copy = Path(found.pop("snapshot"))
        original = root / "datasets" / "user" / "pictures"
        names = [path.relative_to(original) for path in original.rglob("*") if path.is_file()]
        assert {name: (copy / name).read_bytes() for name in names} == {
            name: (original / name).read_bytes() for name in names
        }
    assert found == {
        "labels": {split: [label for shard in expected[split] for _, label in shard] for split in ("train", "test")},
        "old": 6,
        "magic": "PAR1",
        "parameters": model.num_parameters(),
        "files": ["config.json", "model.safetensors"],
        "card": CARD,
        "user": "user",
        "errors": ["RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"],
    }

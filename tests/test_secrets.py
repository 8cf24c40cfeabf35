"""Passwords and signatures in URLs, and paths that nobody typed: no file and no output of any command has them."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from PIL import Image
from runs import environment

pytest.importorskip("datasets")
from image_sets import png, write_files, write_tar

from hf_mae.data.place import short_names
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError, one_line, without_secrets


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("https://user:pw@host/a.tar?X-Amz-Signature=1/2+3==", "https://host/a.tar"),
        ("https://hf_token@huggingface.co/x", "https://huggingface.co/x"),
        ("s3://bucket/a.tar?token=1", "s3://bucket/a.tar"),
        ("simplecache::https://u:p%40@host:8080/x.tar?a=1", "simplecache::https://host:8080/x.tar"),
        ("https://u:p@ss@host/x", "https://host/x"),
        ("https://host?token=1", "https://host"),
        ("hf://datasets/user/repo@revision/x.tar", "hf://datasets/user/repo@revision/x.tar"),
        ("403, url='https://u:p@host/x?s=1', again", "403, url='https://host/x', again"),
        ("two: https://a@b/c?d https://e@f/g?h end", "two: https://b/c https://f/g end"),
        ("folder/what?.jpg at me@home", "folder/what?.jpg at me@home"),
        ("file:///home/a/b.png", "file:///home/a/b.png"),
    ],
)
def test_user_info_and_query_are_cut_from_urls_alone(text, public):
    assert without_secrets(text) == public
    assert without_secrets({"a": [text, 1, None]}) == {"a": [public, 1, None]}
    assert str(DataError(text)) == one_line(OSError(text)) == public


def test_names_of_files_have_no_query_and_stay_unique():
    urls = [f"https://u:p@host/{name}.tar?sig=a/{name}" for name in "ab"]
    assert short_names(urls) == ["a.tar", "b.tar"]
    assert short_names([f"https://host/{folder}/a.tar?x={folder}/a.tar" for folder in "12"]) == ["1/a.tar", "2/a.tar"]
    assert short_names(["https://host/a.tar?part=1", "https://host/a.tar?part=2"]) == ["a.tar (0)", "a.tar (1)"]
    assert short_names(["/d/what?.tar", "/d/b.tar"]) == ["what?.tar", "b.tar"]


class _Signed(SimpleHTTPRequestHandler):
    """Files with ranges, for those who bring the password."""

    def do_GET(self):
        user = base64.b64encode(b"user:PASSWORDCANARY").decode()
        path = self.translate_path(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Basic {user}" or "SIGNATURECANARY" not in self.path:
            self.send_error(403)
            return
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            content = file.read()
        start, stop = 0, len(content)
        asked = self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or stop - 1) + 1, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    do_HEAD = do_GET

    def log_message(self, format, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder that is served, and the address of a file in it, with a password and a signature."""
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Signed, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def url(name: str, signature="SIGNATURECANARY") -> str:
        return f"http://user:PASSWORDCANARY@127.0.0.1:{server.server_port}/{name}?X-Amz-Signature={signature}/a=="

    yield tmp_path / "served", url
    server.shutdown()
    server.server_close()


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["t.tar", "t.parquet"])
def test_files_with_a_signature_are_downloaded_into_a_table(served, own_caches_of_urls, name):
    folder, url = served
    images = [png(number) for number in range(3)]
    write_tar(folder / "t.tar", [(f"{number}.png", image) for number, image in enumerate(images)])
    pq.write_table(pa.table({"image": [{"bytes": image, "path": None} for image in images]}), folder / "t.parquet")
    source = open_source(url(name), streaming=False)
    assert [row.image for row in source.read(0, [0, 1, 2])] == images
    assert "CANARY" not in json.dumps([source.fingerprint, source.name, source.shard_names])


def test_keys_and_fingerprints_have_no_signature(served, own_caches_of_urls):
    folder, url = served
    write_files(folder, {"a.png": png(1)})
    write_tar(folder / "t.tar", [("1.png", png(3))])
    for name, key in (("a.png", "a.png"), ("t.tar", "t.tar#0")):
        sources = [open_source(url(name, f"SIGNATURECANARY{number}")) for number in range(2)]
        assert sources[0].fingerprint == sources[1].fingerprint
        assert [row.key for row in sources[1].read(0, [0])] == [key]
        assert "CANARY" not in json.dumps([sources[0].fingerprint, sources[0].name, sources[0].shard_names])


@pytest.fixture
def own_caches_of_urls(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("hf_mae.data.remote.RETRY_FIRST_DELAY", 0.001)


TINY = """
    --image_size 16 --patch_size 8 --hidden_size 8 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 8
    --decoder_hidden_size 8 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2 --decoder_intermediate_size 8
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.mark.slow
def test_no_command_stores_or_shows_a_secret_or_a_path_that_was_not_typed(served, tmp_path, hub):
    folder, url = served
    members = [part for i in range(40) for part in ((f"{i:03d}.png", picture(i)), (f"{i:03d}.cls", b"%d" % (i % 2)))]
    members[4] = ("002.png", b"\x89PNG broken")
    write_tar(folder / "t.tar", members)
    write_tar(folder / "good.tar", members[8:])
    work = tmp_path / "CWDCANARY"
    work.mkdir()
    shutil.copy(folder / "good.tar", work)
    home, hf_home = tmp_path / "HOMECANARY", tmp_path / "HFHOMECANARY"
    said, failed = [], []

    def run(command: str, status: int = 0):
        own = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "NO_PROXY", "no_proxy")
        variables = environment() | {name: hub.env[name] for name in own}
        variables |= {"HOME": str(home), "HF_HOME": str(hf_home), "ACCELERATE_USE_CPU": "true"}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "TOKENCANARY", "TMPDIR": str(tmp_path)}
        words = [sys.executable, "-m", "hf_mae.cli", *command.split()]
        done = subprocess.run(words, capture_output=True, cwd=work, env=variables, timeout=600)
        said.append((command, done.stdout + done.stderr))
        if done.returncode != status:
            failed.append((command, done.stderr.decode()))

    data = url("t.tar")
    read = f"--dataset {data} --num_workers 0 --max_bad_fraction 1"
    changed = read.replace("SIGNATURECANARY", "SIGNATURECANARY2")
    run(f"inspect --dataset {data}")
    run(f"prepare {data} prepared --num_workers 0 --max_bad_fraction 1")
    run(f"pretrain {read} --output_dir p {TINY} --total_batch_size 4 --total_steps 2 --save_steps 1")
    shutil.rmtree(work / "p" / "checkpoint-2")
    run(f"pretrain {changed} --output_dir p {TINY} --total_batch_size 4 --total_steps 2 --save_steps 1 --resume auto")
    good = f"--dataset {url('good.tar')} --num_workers 0"
    run(f"finetune --model p {good} --total_batch_size 4 --total_steps 2 --output_dir f --predictions f.csv")
    run(f"evaluate classification --model f {good} --results f/results.json --predictions again.parquet")
    run(f"predict --model f {read} --output predicted.csv")
    for protocol in ("knn", "linear-probe"):
        run(f"evaluate {protocol} --model p {read} --results p/results.json")
    for file in ("e.parquet", "e.npy"):
        run(f"embed --model p {read} --output {file}")
    run(f"reconstruct {data} --model p --output r.png")
    for model in "pf":
        run(f"report {model} --output {model}.html")
        run(f"card --model {model} --output {model}.md")
    run("convert p converted --to vit_mae")
    run("export p exported --to torch_export")
    run(f"demo --model p --gallery {data} --output_dir space")
    for model in "pf":
        run(f"push {model} --repo_id user/{model}")
    run(f"inspect --dataset {url('absent.tar')}", 2)
    run(f"inspect --dataset {data.replace('PASSWORDCANARY', 'WRONGCANARY')}", 2)
    assert failed == []
    canary = b"CANARY"
    assert [(command, text) for command, text in said if canary in text] == []
    written = [path for place in (work, tmp_path / "hub") for path in place.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert [str(path.relative_to(tmp_path)) for path in written if canary in path.read_bytes()] == []

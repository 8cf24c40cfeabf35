import logging
import random

import pytest

pytest.importorskip("datasets")
import fsspec
from image_sets import check_images, png, samples, upload, write_files, write_parquet, write_tar

from hf_mae.data import remote
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError, SourceUnavailable

pytestmark = pytest.mark.usefixtures("own_caches")


class HttpError(OSError):
    def __init__(self, status):
        super().__init__(f"HTTP {status} for https://host/file?signature=secret")
        self.status = status


class FaultyFile:
    """A remote file whose reads raise what is left in `faults`, or bring half of the bytes for None."""

    def __init__(self, data, faults):
        self.data, self.faults, self.position, self.size = data, faults, 0, len(data)

    def seekable(self):
        return True

    def seek(self, position):
        self.position = position

    def read(self, size):
        if self.faults:
            fault = self.faults.pop(0)
            if fault is not None:
                raise fault
            size //= 2
        return self.data[self.position : self.position + size]


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Parquet, tar and images in a bucket, and a list: put faults in, and the next reads have them."""
    write_parquet(tmp_path / "d", files=1)
    write_tar(tmp_path / "d" / "a.tar", samples(range(50)))
    write_files(tmp_path / "d" / "images", {f"{i:02d}.png": png(i) for i in range(3)})
    upload(tmp_path / "d")
    faults = []
    memory = fsspec.filesystem("memory")
    store = {path: file.getvalue() for path, file in memory.store.items()}
    monkeypatch.setattr(
        type(memory), "open", lambda self, path, *_, **__: FaultyFile(store["/" + path.strip("/")], faults)
    )
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path: FaultyFile(store["/" + path.strip("/")], faults).read(10**9)
    )
    return faults


TRANSIENT = [TimeoutError(), HttpError(503), HttpError(429), OSError("odd")]


@pytest.mark.parametrize("file", ["train-00000-of-00001.parquet", "a.tar", "images"])
def test_a_read_that_fails_a_few_times_is_tried_again_and_loses_nothing(network, caplog, file):
    numbers = range(3 if file == "images" else 50)
    with_half = [] if file == "images" else [None]  # whole files have no size to compare with
    source = open_source(f"memory://bucket/{file}")
    network.extend([*with_half, *TRANSIENT])
    check_images(source, numbers, labels=file != "images")
    assert not network
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "of 6 for" in r.message]) == len(
        [*with_half, *TRANSIENT]
    )
    assert "secret" not in caplog.text
    network.append(HttpError(500))
    assert len(open_source(f"memory://bucket/{file}")) == len(numbers)


@pytest.mark.parametrize("file", ["train-00000-of-00001.parquet", "a.tar", "images"])
def test_a_network_that_stays_away_ends_the_run_and_is_no_bad_sample(network, file):
    source = open_source(f"memory://bucket/{file}")
    network.extend([HttpError(502)] * 100)
    with pytest.raises(SourceUnavailable, match=r"could not be read in 6 tries .*check the network") as caught:
        source.read(0, [0])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)
    network.clear()
    assert source.read(0, [0])[0].image == png(0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_forbidden_or_missing_is_not_asked_for_again(network, status):
    network.append(HttpError(status))
    with pytest.raises(DataError, match=f"cannot read .*HTTP {status}.*log in") as caught:
        open_source("memory://bucket/a.tar")
    assert not isinstance(caught.value, SourceUnavailable)
    assert not network


def test_the_pauses_double_up_to_a_bound_and_leave_the_random_numbers_alone(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "RETRY_FIRST_DELAY", 1.0)
    monkeypatch.setattr(remote, "RETRY_MAX_DELAY", 6.0)
    random.seed(0)
    before = random.getstate()
    with pytest.raises(SourceUnavailable):
        remote.with_retries(lambda: (_ for _ in ()).throw(TimeoutError()), "it")
    assert random.getstate() == before
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, [1, 2, 4, 6, 6], strict=True))


def test_what_lies_behind_an_exception_decides_whether_another_try_may_help():
    wrapped = FileNotFoundError("no data set")  # as `datasets` reports a server that is down
    wrapped.__context__ = HttpError(503)
    assert remote.is_transient(wrapped)
    assert not remote.is_transient(FileNotFoundError("no data set"))
    assert not remote.is_transient(OSError(28, "No space left on device"))
    assert not remote.is_transient(type("OfflineModeIsEnabled", (ConnectionError,), {})())
    assert not remote.is_transient(ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"))
    assert remote.is_transient(type("ConnectError", (type("TransportError", (Exception,), {}),), {})())
    assert not remote.is_transient(ValueError("a bug"))

"""Read byte ranges of remote files, and retry when the network fails.

A failed read is retried after longer and longer pauses. The last failure raises `SourceUnavailable`, so a network fault
never counts as a bad sample.
"""

import io
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from ..errors import DataError, SourceUnavailable, one_line
from ..files import is_disk_full

logger = logging.getLogger(__name__)

RETRY_TRIES = 6  # reads, including the first
RETRY_FIRST_DELAY = 1.0  # seconds, doubled each time
RETRY_MAX_DELAY = 60.0  # seconds
READ_AHEAD = 4 * 2**20  # bytes per request, for many small reads in order

# Base classes of connection errors in httpx, aiohttp and botocore, which are not OSErrors. Given by name, because not
# all three are installed.
_CONNECTION_ERRORS = {"TransportError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError"}
_NO_RANGES = "can't be read in parts; download it and give the local path"
# A pause must not advance the global generator, and forked workers must not share one.
_jitter = random.SystemRandom()
_Result = TypeVar("_Result")


def is_remote(url: str) -> bool:
    """Whether this is an fsspec URL; False for a local path."""
    return "://" in url


def is_transient(error: BaseException) -> bool:
    """Whether another try may help: for time-outs, broken connections, HTTP 408, 429 and 5xx, and most OSErrors."""
    chain = list(_causes(error))
    # `datasets` puts the name of the Hub's exception into its own message.
    if any("OfflineModeIsEnabled" in f"{type(cause).__name__} {cause}" for cause in chain):
        return False
    # `datasets` turns a server's 503 into a FileNotFoundError with the HTTP error somewhere among its causes.
    if any(_status(cause) in (408, 429) or (_status(cause) or 0) >= 500 for cause in chain):
        return True
    if _status(error) is not None:
        return False
    names = {base.__name__ for cause in chain for base in type(cause).__mro__}
    if names & _CONNECTION_ERRORS or any(isinstance(cause, (TimeoutError, ConnectionError)) for cause in chain):
        return True
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, final) and not is_disk_full(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(20):  # a chain may be circular
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """HTTP status, from huggingface_hub and httpx (`response.status_code`) or aiohttp (`status`)."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def with_retries(call: Callable[[], _Result], what: str) -> _Result:
    """Call a function that is safe to repeat, up to `RETRY_TRIES` times; `what` names it in messages.

    Raises:
        SourceUnavailable: if every try failed.
        DataError: at once, if the file doesn't exist or access is denied.
    """
    for attempt in range(1, RETRY_TRIES + 1):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            if not is_transient(error):
                if isinstance(error, OSError) or _status(error) is not None:
                    remedy = "check the name; for private or gated data log in, e.g. with `hf auth login`"
                    reason = "there is no such file" if str(error) == what else one_line(error)
                    raise DataError(f"cannot read {what}: {reason}; {remedy}") from error
                raise
            cause = f"{type(error).__name__}: {one_line(error)}"
            if attempt == RETRY_TRIES:
                message = f"{what} could not be read in {attempt} tries ({cause}); check the network, then start again"
                raise SourceUnavailable(message) from error
            delay = min(RETRY_FIRST_DELAY * 2 ** (attempt - 1), RETRY_MAX_DELAY) * _jitter.uniform(0.5, 1.0)
            logger.warning("try %d of %d for %s failed, next in %.1f s (%s)", attempt, RETRY_TRIES, what, delay, cause)
            time.sleep(delay)
    raise AssertionError("RETRY_TRIES must be at least 1")


def open_bytes(url: str, *, read_ahead: bool = False) -> BinaryIO:
    """Open a local path or an fsspec URL for reading and seeking; `read_ahead` is for many small reads in order.

    Raises:
        DataError: if there is no such file; for a URL, the errors of `with_retries`.
    """
    if is_remote(url):
        raw = RemoteFile(url)
        return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD) if read_ahead else raw)
    try:
        return open(url, "rb")
    except OSError as error:
        raise DataError(f"cannot open {url}: {error.strerror}; it was there when the data set was listed") from error


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Report an error of the disk as a DataError; `name` is the file or data set that is read."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {name}: {one_line(error)}; check the disk") from error


def read_whole(fs: Any, url: str) -> bytes:
    """All bytes of the file at a URL of this fsspec file system."""

    def call() -> bytes:
        path = fs._strip_protocol(url)
        if "hf" in fs.protocol:
            # cat_file of the Hub's file system asks for the file's size first; this needs only one request.
            with fs.open(path, "rb", block_size=0) as file:
                return file.read()
        return fs.cat_file(path)

    return with_retries(call, url)


class RemoteFile(io.RawIOBase):
    """A file behind an fsspec URL: each read is one range request, repeated from the same place if it fails."""

    def __init__(self, url: str):
        super().__init__()
        self.url = url
        self._position = 0
        self.size = with_retries(self._connect, url)

    def _connect(self) -> int:
        fs, path = fsspec.core.url_to_fs(self.url)
        # Readers here know which bytes they need; fsspec's own read-ahead would fetch 5 MB around each.
        self._handle = fs.open(path, "rb", cache_type="none")
        size = getattr(self._handle, "size", None)
        if size is None or not self._handle.seekable():
            raise DataError(f"{self.url} {_NO_RANGES}")
        return int(size)

    def _fetch(self, start: int, stop: int) -> bytes:
        if self._handle is None:
            self._connect()
        try:
            self._handle.seek(start)
            data = self._handle.read(stop - start)
            if len(data) != stop - start:
                raise OSError(f"got {len(data)} of {stop - start} bytes")
        except ValueError as error:  # a web server that only sends files from their start
            raise DataError(f"{self.url} {_NO_RANGES} ({one_line(error)})") from error
        except Exception:
            self._handle = None  # a new connection for the next try
            raise
        return data

    def readinto(self, buffer) -> int:  # type: ignore[override]
        start, stop = self._position, min(self._position + len(buffer), self.size)
        if start >= stop:
            return 0
        buffer[: stop - start] = with_retries(lambda: self._fetch(start, stop), self.url)
        self._position = stop
        return stop - start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

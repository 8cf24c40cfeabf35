"""A small Hugging Face Hub on 127.0.0.1, to read from and to push to, for tests that need no network.

Repositories are plain folders, `root/datasets/USER/NAME/...` and `root/models/USER/NAME/...`: that is the
revision `main`. A folder `root/datasets/USER/NAME.rev/REVISION/...` is another one. A revision also answers
to its sha, a hash of its paths and bytes. Every file is a "regular" git blob, no Xet; files whose names end with
`hub.lfs` are uploaded by LFS. A commit keeps the state before it in `NAME.rev/SHA`. With `hub.token`, only requests
that bring it may write, or see what is private.

The clients read HF_ENDPOINT when they are imported, so a test starts a fresh interpreter with `hub.env`:

    with HubServer(root) as hub:
        subprocess.run([sys.executable, "-c", script], env=hub.env, check=True)
    assert all(request.range for request in hub.requests if request.path.endswith(".parquet"))
"""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

DATE = "2024-01-01T00:00:00.000Z"  # of every commit


class Request(NamedTuple):
    """One request; `status` is None where the connection was cut before or in the middle of the answer."""

    method: str
    path: str  # unquoted, without the query
    status: int | None
    range: str | None  # the Range header


class Call(NamedTuple):
    """What a handler gets; `query` holds the parameters of the URL, or the fields of a form."""

    hub: "HubServer"
    method: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # keys in lower case
    body: bytes

    @property
    def authorized(self) -> bool:
        return self.hub.token in (None, self.headers.get("authorization", "").removeprefix("Bearer "))


class Response(NamedTuple):
    status: int = 200  # 0 closes the connection without an answer
    body: bytes = b""
    headers: dict[str, str] = {}  # never written to
    cut: bool = False  # close the connection after half of the body


class HubError(Exception):
    """Becomes the X-Error-Code of a 404, from which the clients choose their exception."""


class Revision:
    """One revision of one repository, read from its folder at each request."""

    def __init__(self, call: Call, kind: str, repo: str, revision: str):
        main = call.hub.root / kind / repo
        if not main.is_dir() or (repo in call.hub.private and not call.authorized):
            raise HubError("RepoNotFound")
        for folder in (main, *Path(f"{main}.rev").glob("*")):
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            self.files = {path.relative_to(folder).as_posix(): path for path in paths}
            self.sha = _sha1(json.dumps({name: blob_id(path) for name, path in self.files.items()}).encode())
            if revision in ("main" if folder == main else folder.name, self.sha):
                break
        else:
            raise HubError("RevisionNotFound")
        self.folder = folder
        self.folders = {str(parent) for name in self.files for parent in Path(name).parents} - {"."}

    def entry(self, path: str, query: dict[str, list[str]]) -> dict:
        """A file or a folder, as the tree and paths-info answers show it."""
        commit = {"lastCommit": {"id": self.sha, "title": "commit", "date": DATE}}
        if file := self.files.get(path):
            entry = {"type": "file", "path": path, "oid": blob_id(file), "size": file.stat().st_size}
        else:
            entry = {"type": "directory", "path": path, "oid": _sha1(path.encode()), "size": 0}
        return entry | (commit if query.get("expand") == ["true"] else {})


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def blob_id(path: Path) -> str:
    """The file's git object id."""
    return _blob_id(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _blob_id(path: Path, mtime_ns: int, size: int) -> str:
    return _sha1(b"blob %d\0" % size + path.read_bytes())


def as_json(data: object, status: int = 200) -> Response:
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def whoami(call: Call) -> Response:
    return as_json({"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})


def repo_info(call: Call, kind: str, repo: str, revision: str = "main") -> Response:
    found = Revision(call, kind, repo, revision)
    info = {"id": repo, "sha": found.sha, "siblings": [{"rfilename": name} for name in found.files]}
    return as_json(info | {"private": repo in call.hub.private, "gated": False, "tags": [], "lastModified": DATE})


def tree(call: Call, kind: str, repo: str, revision: str, folder: str) -> Response:
    found = Revision(call, kind, repo, revision)
    if folder and folder not in found.folders:
        raise HubError("EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    names = sorted(name for name in {*found.files, *found.folders} if name.startswith(prefix))
    if call.query.get("recursive") != ["true"]:
        names = [name for name in names if "/" not in name.removeprefix(prefix)]
    return as_json([found.entry(name, call.query) for name in names])


def paths_info(call: Call, kind: str, repo: str, revision: str) -> Response:
    found = Revision(call, kind, repo, revision)
    known = [path for path in call.query.get("paths", []) if path in found.files or path in found.folders]
    return as_json([found.entry(path, call.query) for path in known])


def resolve(call: Call, kind: str, repo: str, revision: str, path: str) -> Response:
    """A file's bytes, whole or one range of them; this is where `fail_next` strikes."""
    found = Revision(call, kind.rstrip("/") or "models", repo, revision)
    if path not in found.files:
        raise HubError("EntryNotFound")
    failure = call.hub.take_failure(path) if call.method == "GET" else None
    if failure and failure[0]:
        return Response(failure[0])
    body, etag = found.files[path].read_bytes(), blob_id(found.files[path])
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if not wanted:
        return Response(200, body, headers, cut=failure is not None)
    start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(body)) if wanted[2] else len(body)
    if start >= stop:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{len(body)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
    return Response(206, body[start:stop], headers, cut=failure is not None)


def create_repo(call: Call) -> Response:
    wanted = json.loads(call.body)
    repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
    url = {"url": f"{call.hub.url}/{repo}", "name": repo, "id": repo}
    if not repo.startswith("user/"):
        return as_json({"error": "You don't have the rights to create a model under this namespace"}, status=403)
    try:
        (call.hub.root / f"{wanted.get('type', 'model')}s" / repo).mkdir(parents=True)
    except FileExistsError:
        return as_json({"error": "You already created this model repo", **url}, status=409)
    if wanted.get("private") or wanted.get("visibility") == "private":  # huggingface_hub 1.x, 2.4
        call.hub.private.add(repo)
    return as_json(url)


def create_branch(call: Call, kind: str, repo: str, branch: str) -> Response:
    source = Revision(call, kind, repo, json.loads(call.body or b"{}").get("startingPoint", "main")).folder
    folder = Path(f"{call.hub.root / kind / repo}.rev") / branch
    if folder.exists():
        return as_json({"error": "Reference already exists"}, status=409)
    shutil.copytree(source, folder)
    return as_json({})


def validate_yaml(call: Call) -> Response:
    """A part of the Hub's rules for the metadata of a card."""
    content = json.loads(call.body)["content"].replace("\r\n", "\n")
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    metadata = yaml.safe_load(found[1]) if found else {}
    errors = [f'"{key}" must be a string' for key in ("pipeline_tag", "library_name", "license")
              if not isinstance(metadata.get(key, ""), str)]  # fmt: skip
    errors += [f'"{key}" must be a list of strings' for key in ("tags", "datasets")
               if not all(isinstance(word, str) for word in metadata.get(key, []))]  # fmt: skip
    if metadata.get("license", "mit") not in ("apache-2.0", "mit", "cc-by-nc-4.0", "other"):
        errors.append(f'"license" {metadata["license"]} is unknown')
    if metadata.get("license") == "other" and "license_name" not in metadata:
        errors.append('"license_name" is required')
    if not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in metadata.get("datasets", [])):
        errors.append('"datasets" must be ids')
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            if not {"type", "name"} <= result["dataset"].keys() or "type" not in result["task"]:
                errors.append("\"model-index\" needs a task's type, and a data set's type and name")
            if any(not isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append('"model-index": a metric\'s value must be a number')
    answer = {"errors": [{"message": text} for text in errors], "warnings": []}
    return as_json(answer, status=400 if errors else 200)


def preupload(call: Call, kind: str, repo: str, revision: str) -> Response:
    found = Revision(call, kind, repo, revision)
    return as_json({"files": [
        {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(call.hub.lfs) else "regular",
         "shouldIgnore": False, "oid": blob_id(found.files[file["path"]]) if file["path"] in found.files else None}
        for file in json.loads(call.body)["files"]
    ]})  # fmt: skip


def lfs_batch(call: Call, repo: str) -> Response:
    """What is there already needs no action: an interrupted upload goes on with the files that it lacks."""
    objects = json.loads(call.body)["objects"]
    for wanted in objects:
        if not (call.hub.root / "lfs" / wanted["oid"]).exists():
            urls = {name: {"href": f"{call.hub.url}/_lfs/{name}/{wanted['oid']}"} for name in ("upload", "verify")}
            wanted["actions"] = urls
    return as_json({"transfer": "basic", "objects": objects})


def lfs_upload(call: Call, oid: str) -> Response:
    if hashlib.sha256(call.body).hexdigest() != oid:
        return as_json({"error": "sha256 differs"}, status=400)
    (call.hub.root / "lfs").mkdir(exist_ok=True)
    (call.hub.root / "lfs" / oid).write_bytes(call.body)
    return Response()


def lfs_verify(call: Call, oid: str) -> Response:
    return Response(200 if (call.hub.root / "lfs" / oid).exists() else 404)


def commit(call: Call, kind: str, repo: str, revision: str) -> Response:
    """All of a commit or nothing of it."""
    found = Revision(call, kind, repo, revision)
    changed = Path(tempfile.mkdtemp(dir=call.hub.home)) / "changed"
    shutil.copytree(found.folder, changed)
    for line in call.body.splitlines():
        key, value = json.loads(line)["key"], json.loads(line)["value"]
        path = changed / value.get("path", "")
        if key == "deletedFile":
            path.unlink()
        elif key in ("file", "lfsFile"):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = base64.b64decode(value["content"]) if key == "file" else None
            path.write_bytes(content if content is not None else (call.hub.root / "lfs" / value["oid"]).read_bytes())
    before = Path(f"{call.hub.root / kind / repo}.rev") / found.sha
    with call.hub._lock:
        shutil.rmtree(before, ignore_errors=True)  # of the same content
        before.parent.mkdir(exist_ok=True)
        shutil.move(found.folder, before)
        shutil.move(changed, found.folder)
    sha = Revision(call, kind, repo, revision).sha
    url = f"{call.hub.url}/{repo}/commit/{sha}"
    return as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def commits(call: Call, kind: str, repo: str, revision: str) -> Response:
    sha = Revision(call, kind, repo, revision).sha
    return as_json([{"id": sha, "title": "commit", "message": "", "date": DATE, "authors": []}])


def fail(call: Call) -> Response:
    """Lets the process under test call `fail_next` itself, at the moment that it chooses."""
    call.hub.fail_next(**json.loads(call.body))
    return Response()


_REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
_PART = r"([^/]+)"  # paths are matched while quoted, so that a revision has no slash
# Method, pattern of the whole path, handler(call, *unquoted groups). A HEAD is a GET without the body.
ROUTES: list[tuple[str, str, Callable[..., Response]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("GET", _REPO, repo_info),
    ("GET", rf"{_REPO}/revision/{_PART}", repo_info),
    ("GET", rf"{_REPO}/tree/{_PART}/?(.*)", tree),
    ("POST", rf"{_REPO}/paths-info/{_PART}", paths_info),
    ("GET", rf"/(datasets/)?([^/]+/[^/]+)/resolve/{_PART}/(.+)", resolve),
    ("POST", r"/_fail", fail),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{_REPO}/branch/{_PART}", create_branch),
    ("POST", rf"{_REPO}/preupload/{_PART}", preupload),
    ("POST", rf"{_REPO}/commit/{_PART}", commit),
    ("GET", rf"{_REPO}/commits/{_PART}", commits),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/_lfs/upload/(\w+)", lfs_upload),
    ("POST", r"/_lfs/verify/(\w+)", lfs_verify),
]


# What is asked with a POST all the same.
_READS = r"/api/validate-yaml|/_fail|.*/paths-info/.*"


def _route(call: Call, path: str) -> Response:
    if (broken := call.hub.break_at) and broken[1] > 0 and re.fullmatch(broken[0], f"{call.method} {path}"):
        call.hub.break_at = (broken[0], broken[1] - 1)
        return Response(0)
    writes = call.method in ("POST", "PUT") and not re.fullmatch(_READS, path) and "/_lfs/" not in path
    if (writes or path == "/api/whoami-v2") and not call.authorized:
        return as_json({"error": "Invalid username or password."}, status=401)
    for method, pattern, handler in ROUTES:
        if call.method.replace("HEAD", "GET") == method and (match := re.fullmatch(pattern, path)):
            try:
                return handler(call, *(unquote(group or "") for group in match.groups()))
            except HubError as error:
                return Response(404, b"", {"X-Error-Code": str(error)})
    return as_json({"error": f"no route for {call.method} {path}"}, status=404)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the clients keep their connections open
    hub: "HubServer"

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if "form-urlencoded" in headers.get("content-type", ""):
            query = body.decode()
        response = _route(Call(self.hub, self.command, parse_qs(query), headers, body), path)
        status = None if response.cut or not response.status else response.status
        self.hub.requests.append(Request(self.command, unquote(path), status, headers.get("range")))
        if not response.status:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if response.cut else response.body)
        self.close_connection |= response.cut

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubServer:
    """The server, from `__enter__` to `__exit__` (see the module's docstring).

    Attributes:
        url: `http://127.0.0.1:PORT`.
        home: HF_HOME of the processes that get `env`; empty at first, removed at the end.
        requests: every request answered so far.
        token: what a request must bring to write, or to see private repositories; None: all may.
        private: repositories, as USER/NAME.
        lfs: endings of the files that are uploaded by LFS.
        break_at: pattern of "METHOD PATH", and how many such requests get no answer before they are routed.
    """

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[Request] = []
        self.token: str | None = None
        self.private: set[str] = set()
        self.lfs: tuple[str, ...] = ()
        self.break_at: tuple[str, int] | None = None
        self._failures: list[tuple[int | None, str]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self._folder = tempfile.TemporaryDirectory()
        self.home = Path(self._folder.name)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that uses this server; HF_* variables of ours do not get there."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_TOKEN": "hf_dummy"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | hub | quiet | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def fail_next(self, n: int, status: int | None = 503, suffix: str = "") -> None:
        """Make the next n GETs of file content fail.

        Args:
            n: how many; 0 forgets the failures still to come.
            status: the HTTP status they get; None sends half of the body, then closes the connection.
            suffix: end of the paths that fail, e.g. ".parquet" to leave README.md readable.
        """
        with self._lock:
            self._failures = [(status, suffix)] * n

    def take_failure(self, path: str) -> tuple[int | None, str] | None:
        with self._lock:
            due = self._failures and path.endswith(self._failures[0][1])
            return self._failures.pop() if due else None

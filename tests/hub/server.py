"""A small Hugging Face Hub on the loopback interface, for tests with the real `huggingface_hub` client.

It keeps models in memory and speaks the part of the Hub's HTTP API that creating, uploading, listing and downloading
takes, without Xet.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import yaml


# Tokens and what they allow: (user, may write).
WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_write", "hf_read", "hf_other"
TOKENS = {WRITE_TOKEN: ("user", True), READ_TOKEN: ("user", False), OTHER_TOKEN: ("other", True)}

LFS_THRESHOLD = 64 * 1024
REPO = r"([^/]+/[^/]+)"
ROUTES = []


class Refusal(Exception):
    """An answer with an error status; the client makes its exceptions from status, code and message."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **fields):
        super().__init__(message)
        self.fields = {"error": message, **fields}
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {key: value for key, value in headers.items() if value is not None}


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    date: str
    files: MappingProxyType  # {path: bytes}, all of the repository's: a commit needs no other, and does not change


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # {name: sha}
    tags: dict[str, str] = field(default_factory=dict)  # {name: sha}
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded large files: {sha256: content}

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{self.name} {parent} {len(self.commits)}".encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[sha] = Commit(sha, parent, title, date, MappingProxyType(files))
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


@dataclass
class Fault:
    method: str
    text: str
    status: int | None
    skip: int
    times: int | None
    seen: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or self.text not in path:
            return False
        self.seen += 1
        strikes = self.seen > self.skip and (self.times is None or self.hits < self.times)
        self.hits += strikes
        return strikes


class Hub:
    """The server. `with Hub() as hub:` runs it at `hub.url`, on a free port of 127.0.0.1.

    `repositories` maps names to `Repository`; `requests` lists (method, path, status) of all that was asked.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a repository, {path: bytes}."""
        return dict(self.repositories[name].at(revision).files)

    @contextmanager
    def failing(self, method: str, text: str, status: int | None = 500, skip: int = 0, times: int | None = None):
        """While open, requests of `method` whose path contains `text` fail; the yielded fault counts its `hits`.

        The first `skip` of them pass, then `times` fail (None: all). `status=None` breaks the connection in the middle
        of the request's body, or of the answer's if the request has none. Paths of interest: "/repos/create",
        "/preupload/", "/lfs/" (PUT, a large file), "/commit/", "/resolve/". The client tries again after a 429, a 5xx
        or a broken connection, six times in 23 seconds, but not when it creates or commits; another status (say 403)
        ends it at once.
        """
        fault = Fault(method, text, status, skip, times)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_THRESHOLD or (size > 0 and path.endswith(".safetensors"))


def file_entry(path: str, data: bytes) -> dict:
    """What a listing says of a file. `oid` is git's name for the content."""
    entry = {"type": "file", "path": path, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if is_lfs(path, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def content_id(entry: dict) -> str:
    """What the client compares to tell whether a file has changed."""
    return entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]


def folder_entries(files) -> list[dict]:
    folders = {path[: match.start()] for path in files for match in re.finditer("/", path)}
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]


def card_metadata(text: str) -> dict:
    """The YAML between two lines `---` at the head of a model card."""
    match = re.match(r"---\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    metadata = (yaml.safe_load(match[1]) if match else None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is not a mapping")
    for key in ("library_name", "pipeline_tag", "license"):
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f'"{key}" must be a string')
    return metadata


def route(method: str, pattern: str):
    def add(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent apart, and the body would wait for the other side

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def handle_request(self):
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        with self.hub.lock:
            fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, self.path)), None)
        self.breaks = fault is not None and fault.status is None
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length // 2 if self.breaks else length)
        if self.breaks and length:
            self.hub.requests.append((self.command, self.path, None))
            self.close_connection = True
            return
        try:
            if fault is not None and not self.breaks:
                raise Refusal(fault.status, "injected fault")
            with self.hub.lock:
                self.answer()
        except Refusal as refusal:
            self.send_json(refusal.fields, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self):
        self.user, self.may_write = None, False
        if "Authorization" in self.headers:
            token = self.headers["Authorization"].removeprefix("Bearer ")
            if token not in TOKENS:
                raise Refusal(401, "Invalid credentials in Authorization header")
            self.user, self.may_write = TOKENS[token]
        wanted = "GET" if self.command == "HEAD" else self.command  # a HEAD is a GET without its body
        for method, pattern, function in ROUTES:
            if method == wanted and (match := pattern.fullmatch(self.path)):
                return function(self, *(group and unquote(group) for group in match.groups()))
        raise Refusal(404, f"this server knows no {self.command} {self.path}")

    def send(self, data: bytes, status: int = 200, headers: dict | None = None):
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.breaks else data)
        self.close_connection |= self.breaks

    def send_json(self, value, status: int = 200, headers: dict | None = None):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def check_may_write(self, namespace: str):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.may_write or self.user != namespace:
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace}")

    def repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        namespace = name.split("/")[0]
        if repository is None or (repository.private and self.user != namespace):
            # Nobody learns whether another's private repository exists; who is not logged in is told to.
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(namespace)
        return repository

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.may_write else "read"
        access = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
        self.send_json({"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": access})

    @route("POST", "/api/repos/create")
    def create_repository(self):
        request = json.loads(self.body)
        namespace = request.get("organization") or self.user
        self.check_may_write(namespace)
        if request.get("type", "model") != "model":
            raise Refusal(400, "this server keeps models only")
        name = f"{namespace}/{request['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = request.get("private") is True or request.get("visibility") == "private"
        self.hub.repositories[name] = Repository(name, private)
        self.hub.repositories[name].commit("main", "initial commit", {".gitattributes": b"* text=auto\n"})
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    @route("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?")
    def model_info(self, name, revision):
        repository = self.repository(name)
        commit = repository.at(revision or "main")
        siblings = []
        for entry in (file_entry(path, data) for path, data in commit.files.items()):
            siblings.append({"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]})
            if "lfs" in entry:
                siblings[-1]["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
        card = card_metadata(commit.files.get("README.md", b"").decode())
        info = {"id": name, "sha": commit.sha, "lastModified": commit.date, "siblings": siblings}
        info |= {"private": repository.private, "gated": False, "tags": card.get("tags", []), "cardData": card}
        self.send_json(info | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, name):
        repository = self.repository(name)
        answer = {"branches": repository.branches, "tags": repository.tags, "converts": {}, "pullRequests": {}}
        for kind, refs in answer.items():
            answer[kind] = [
                {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in refs.items()
            ]
        self.send_json(answer)

    @route("POST", f"/api/models/{REPO}/(branch|tag)/([^/]+)")
    def create_ref(self, name, kind, value):
        repository, request = self.repository(name, write=True), json.loads(self.body)
        # A branch has its name in the path and its start in the body, a tag the other way round.
        if kind == "branch":
            refs, ref, start = repository.branches, value, request.get("startingPoint", "main")
        else:
            refs, ref, start = repository.tags, request["tag"], value
        if ref in refs:
            raise Refusal(409, f"Reference already exists: {ref}")
        refs[ref] = repository.at(start).sha
        self.send_json({})

    # Listings

    @route("GET", f"/api/models/{REPO}/commits/([^/]+)")
    def list_commits(self, name, revision):
        repository = self.repository(name)
        commit, answer = repository.at(revision), []
        while commit is not None:
            answer.append({"id": commit.sha, "title": commit.title, "message": "", "date": commit.date, "authors": []})
            commit = repository.commits.get(commit.parent)
        self.send_json(answer)

    @route("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?")
    def tree(self, name, revision, folder):
        files = self.repository(name).at(revision).files
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries = [file_entry(path, data) for path, data in files.items()] + folder_entries(files)
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.send_json(entries)

    @route("POST", f"/api/models/{REPO}/paths-info/([^/]+)")
    def paths_info(self, name, revision):
        files = self.repository(name).at(revision).files
        paths = parse_qs(self.body.decode())["paths"]
        entries = [file_entry(path, files[path]) for path in paths if path in files]
        self.send_json(entries + [entry for entry in folder_entries(files) if entry["path"] in paths])

    # Downloads

    @route("GET", f"/{REPO}/resolve/([^/]+)/(.+)")
    def resolve(self, name, revision, path):
        commit = self.repository(name).at(revision)
        if path not in commit.files:
            # The commit lets the client remember that it has no such file.
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        data = commit.files[path]
        entry = file_entry(path, data)
        headers = {"ETag": f'"{content_id(entry)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": len(data), "X-Linked-ETag": headers["ETag"]}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(data, headers=headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if start > end:
            raise Refusal(416, "Requested range not satisfiable")
        self.send(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    # Uploads: announce, put large files, commit

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        try:
            metadata = card_metadata(json.loads(self.body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            return self.send_json({"errors": [{"message": str(error)}]}, 400)
        self.send_json({"warnings": [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]})

    @route("POST", f"/api/models/{REPO}/preupload/([^/]+)")
    def preupload(self, name, revision):
        present = self.repository(name, write=True).at(revision).files
        answers = []
        for path, size in ((file["path"], file["size"]) for file in json.loads(self.body)["files"]):
            mode = "lfs" if is_lfs(path, size) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in present:
                answers[-1]["oid"] = content_id(file_entry(path, present[path]))
        self.send_json({"files": answers})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name):
        repository, answers = self.repository(name, write=True), []
        for oid, size in ((wanted["oid"], wanted["size"]) for wanted in json.loads(self.body)["objects"]):
            answers.append({"oid": oid, "size": size})
            if oid not in repository.objects:
                links = {
                    "upload": f"{self.hub.url}/lfs/{name}/{oid}",
                    "verify": f"{self.hub.url}/{name}.git/lfs/verify",
                }
                answers[-1]["actions"] = {action: {"href": link} for action, link in links.items()}
        self.send_json({"transfer": "basic", "objects": answers})

    @route("PUT", rf"/lfs/{REPO}/(\w+)")
    def put_object(self, name, oid):
        # As on the Hub, who knows the address needs no token, and the content has to be the announced one.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the announced sha256")
        self.hub.repositories[name].objects[oid] = self.body
        self.send(b"")

    @route("POST", rf"/{REPO}\.git/lfs/verify")
    def verify_object(self, name):
        request = json.loads(self.body)
        if len(self.repository(name, write=True).objects.get(request["oid"], b"")) != request["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.send_json({})

    @route("POST", f"/api/models/{REPO}/commit/([^/]+)")
    def commit(self, name, branch):
        repository = self.repository(name, write=True)
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repository.at(branch).files)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit") not in (None, repository.branches[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for kind, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"].rstrip("/")
            inside = [file for file in files if file.startswith(f"{path}/")]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in repository.objects:
                files[path] = repository.objects[value["oid"]]
            elif kind == "deletedFile" and path in files:
                del files[path]
            elif kind == "deletedFolder" and inside:
                files = {file: data for file, data in files.items() if file not in inside}
            elif kind.startswith("deleted"):
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            else:
                raise Refusal(400, f"{path}: nothing to commit, or no operation this server knows: {kind}")
        sha = repository.commit(branch, header["value"]["summary"], files)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

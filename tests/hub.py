"""A stand-in for the Hub on the loopback: as much of its HTTP API as pushing and loading a model asks for.

    with Hub() as hub:
        ...  # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token and HF_HUB_DISABLE_XET=1 for whoever shall talk to it
        hub.repositories["user/name"].files("main")

Repositories live in memory. As on the Hub, *.safetensors is large (LFS) and is served by a redirect, a new repository
has one commit with .gitattributes, and only the owner's token writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

ROUTES = []
ASIDE = "/api/agent-harnesses"
"""huggingface_hub asks this about itself, once per process and at any time: not noted, and never cut."""
REPOSITORY, REVISION = "(?P<name>(?:(?:spaces|datasets)/)?[^/]+/[^/]+)", "(?P<revision>[^/]+)"
"""Of a Space or a data set, a name begins with its kind."""


class Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, if any, and a message."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message}
        self.headers |= {"X-Error-Code": code} if code else {}


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What tells whether a file has changed: SHA-256 of a large file, git's blob hash of another one."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, File]
    parent: str | None = None

    @property
    def sha(self) -> str:
        tree = sorted((path, file.oid) for path, file in self.files.items())
        return hashlib.sha1(repr((self.title, tree, self.parent)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File | None]) -> str:
        """Change `files` (None deletes) on `branch`, and return the commit's hash."""
        parent = self.branches.get(branch)
        tree = {**(self.commits[parent].files if parent else {}), **files}
        commit = Commit(title, {path: file for path, file in tree.items() if file is not None}, parent)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.at(revision)[1].files.items()}

    def titles(self, branch: str = "main") -> list[str]:
        """Titles of a branch's commits, from the newest to the oldest."""
        titles, sha = [], self.branches[branch]
        while sha is not None:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles

    def at(self, revision: str) -> tuple[str, Commit]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


def route(method: str, pattern: str):
    """The decorated function of (hub, request, **groups of the path) answers; see `Handler.answer`."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Hub:
    """A server that runs between `with Hub() as hub` and its end.

    Attributes:
        url, token: for HF_ENDPOINT and HF_TOKEN.
        repositories: by "owner/name", or "spaces/owner/name" and "datasets/owner/name". Only "user" may be written to.
        requests: "METHOD path" of every request, in order; `tokens` has the token that came with each, or None.
        cut_from: from this request on (counted from 0) connections break; None: never.
        cut_after: where a connection that breaks does so: after so many bytes of the request's body, or of the answer's
            if the request has none; "all" of the request, which is then carried out without an answer.
        reset: break a connection by a reset, rather than by ending it.
    """

    def __init__(self):
        self.token = "hf_of_user"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.cut_from: int | None = None
        self.cut_after: int | str = 0
        self.reset = False

    def __enter__(self) -> Hub:
        handler = type("Handler", (Handler,), dict(hub=self))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def heads(self) -> dict[str, dict[str, str]]:
        """The commit of every branch of every repository."""
        return {name: dict(repository.branches) for name, repository in self.repositories.items()}

    def reachable(self, name: str, request: Handler) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and request.token != self.token):
            raise Refused(404 if request.token else 401, f"no repository {name}", "RepoNotFound")
        return repository

    def writable(self, name: str, request: Handler) -> Repository:
        self.check_writer(name, request)
        return self.reachable(name, request)

    def check_writer(self, name: str, request: Handler) -> None:
        if request.token != self.token:
            raise Refused(401, "Invalid username or password.")
        if not re.match(r"((spaces|datasets)/)?user/", name):
            raise Refused(403, f"You don't have the rights to write to {name}")

    @route("POST", "/api/repos/create")
    def create(self, request):
        kind = request.json.get("type") or "model"
        name = f"{request.json.get('organization') or 'user'}/{request.json['name']}"
        name = name if kind == "model" else f"{kind}s/{name}"
        self.check_writer(name, request)
        if name in self.repositories:
            return dict(url=f"{self.url}/{name}", error="You already created this model repo"), 409
        private = request.json.get("private") or request.json.get("visibility") == "private"
        self.repositories[name] = Repository(private=bool(private))
        self.repositories[name].commit("main", "initial commit", {".gitattributes": File(b"lfs\n", False)})
        return dict(url=f"{self.url}/{name}")

    @route("POST", "/api/validate-yaml")
    def validate(self, request):
        """The Hub refuses a card whose base model cannot be a repository."""
        base = re.search(r"^base_model: *(.*)$", request.json["content"], re.MULTILINE)
        if base and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base[1]):
            return dict(errors=[dict(message=f'"base_model" with value {base[1]} is not valid.')], warnings=[]), 400
        return dict(errors=[], warnings=[])

    @route("GET", f"/api/(?:models/)?{REPOSITORY}(/revision/{REVISION})?")
    def info(self, request, name, revision):
        repository = self.reachable(name, request)
        sha, commit = repository.at(revision or "main")
        siblings = [dict(rfilename=path) for path in sorted(commit.files)]
        return dict(_id=name, id=name, sha=sha, private=repository.private, siblings=siblings, tags=[])

    @route("GET", f"/api/(?:models/)?{REPOSITORY}/tree/{REVISION}(?P<folder>/.*)?")
    def tree(self, request, name, revision, folder):
        _, commit = self.reachable(name, request).at(revision)
        prefix = f"{folder.strip('/')}/" if folder else ""
        if not any(path.startswith(prefix) for path in commit.files):
            raise Refused(404, f"no folder {folder}", "EntryNotFound")
        return [
            dict(type="file", path=path, oid=file.oid, size=len(file.content))
            | (dict(lfs=dict(oid=file.oid, size=len(file.content), pointerSize=130)) if file.large else {})
            for path, file in sorted(commit.files.items())
            if path.startswith(prefix)
        ]

    @route("POST", f"/api/(?:models/)?{REPOSITORY}/branch/{REVISION}")
    def branch(self, request, name, revision):
        repository = self.writable(name, request)
        if revision in repository.branches:
            raise Refused(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.at(request.json.get("startingPoint", "main"))[0]
        return {}

    @route("POST", f"/api/(?:models/)?{REPOSITORY}/preupload/{REVISION}")
    def preupload(self, request, name, revision):
        files = self.writable(name, request).at(revision)[1].files
        answer = []
        for path in (file["path"] for file in request.json["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = files[path].oid if path in files else None
            answer.append(dict(path=path, uploadMode=mode, shouldIgnore=False, oid=oid))
        return dict(files=answer)

    @route("POST", f"/{REPOSITORY}.git/info/lfs/objects/batch")
    def batch(self, request, name):
        self.writable(name, request)
        return dict(
            transfer="basic",
            objects=[
                dict(oid=wanted["oid"], size=wanted["size"])
                | ({} if wanted["oid"] in self.large else self.where_to_upload(wanted["oid"]))
                for wanted in request.json["objects"]
            ],
        )

    def where_to_upload(self, oid: str) -> dict:
        return dict(actions=dict(upload=dict(href=f"{self.url}/lfs/{oid}")))

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "the content is not what was announced")
        self.large[oid] = request.body
        return {}

    @route("GET", "/lfs/(?P<oid>[0-9a-f]{64})")
    def download(self, request, oid):
        return self.large[oid]

    @route("POST", f"/api/(?:models/)?{REPOSITORY}/commit/{REVISION}")
    def commit(self, request, name, revision):
        repository = self.writable(name, request)
        head, *lines = (json.loads(line) for line in request.body.splitlines())
        repository.at(revision)
        files: dict[str, File | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                files[value["path"]] = None
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.large[value["oid"]], True)
            else:
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
        answer = {}
        if "create_pr" in request.query:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/1"
            repository.branches["refs/pr/1"] = repository.at(revision)[0]
            revision = "refs/pr/1"
        sha = repository.commit(revision, head["value"]["summary"], files)
        return dict(answer, success=True, commitOid=sha, commitUrl=f"{self.url}/{name}/commit/{sha}")

    @route("GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, request, name, revision, path):
        sha, commit = self.reachable(name, request).at(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in commit.files:
            raise Refused(404, f"no file {path}", "EntryNotFound")
        file = commit.files[path]
        if not file.large:
            return file.content, 200, {**headers, "ETag": f'"{file.oid}"'}
        self.large[file.oid] = file.content
        linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        # under another name: clients take the headers of the last answer from the Hub itself
        elsewhere = self.url.replace("127.0.0.1", "localhost")
        return b"", 302, {**headers, **linked, "Location": f"{elsewhere}/lfs/{file.oid}"}


class Handler(BaseHTTPRequestHandler):
    """One connection. Every request is noted, read, and answered by the route that it fits, if the hub does not cut."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *arguments) -> None:
        pass

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        bearer = self.headers.get("Authorization")
        self.token = bearer.removeprefix("Bearer ") if bearer else None
        cut = None
        if address.path != ASIDE:
            if self.hub.cut_from is not None and len(self.hub.requests) >= self.hub.cut_from:
                cut = self.hub.cut_after
            self.hub.requests.append(f"{self.command} {address.path}")
            self.hub.tokens.append(self.token)
        size = int(self.headers.get("Content-Length", 0))
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        if isinstance(cut, int) and (size or chunked or not cut):
            self.rfile.read(min(cut, size))
            return self.hang_up()
        self.body = self.read_chunks() if chunked else self.rfile.read(size)
        content, status, headers = self.answer(address.path)
        if cut == "all":
            return self.hang_up()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        if self.hub.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, path: str) -> tuple[bytes, int, dict[str, str]]:
        """Content, status and headers; of a route that returns content alone, or content and status, the rest is
        added. What is not bytes is sent as JSON."""
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for routed, pattern, function in ROUTES:
                if routed == method and (match := pattern.fullmatch(path)):
                    groups = {name: unquote(value) if value else None for name, value in match.groupdict().items()}
                    answer = function(self.hub, self, **groups)
                    break
            else:
                raise Refused(404, f"nothing here knows {method} {path}")
        except Refused as error:
            answer = dict(error=str(error)), error.status, error.headers
        content, *rest = answer if isinstance(answer, tuple) else (answer,)
        status, headers = (*rest, *((200, {})[len(rest) :]))
        return content if isinstance(content, bytes) else json.dumps(content).encode(), status, headers

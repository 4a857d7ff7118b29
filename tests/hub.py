"""A model hub on loopback that speaks the hub's HTTP protocol: repositories, commits, LFS, revisions, tokens, failures.

What huggingface_hub sends to https://huggingface.co it sends here: repos/create, preupload, LFS batch with its upload
and verify actions, commit as ndjson, resolve with ETag and redirects to large files, revisions, model info, whoami.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

READ, WRITE = "hf_read_token_of_alice", "hf_write_token_of_alice"
_LARGE = (".safetensors", ".png", ".gguf", ".bin")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c.oid.startswith(revision) and len(revision) >= 7), None)

    def commit(self, title: str, files: dict[str, bytes]) -> Commit:
        seed = f"{len(self.commits)}{title}{sorted(files)}".encode() + b"".join(files.values())
        self.commits.append(Commit(hashlib.sha1(seed).hexdigest(), title, files))
        return self.commits[-1]


@dataclass
class Fault:
    """What to do instead of answering: a status, or cut the connection after `after` bytes of the body."""

    method: str
    path: str
    status: int = 0
    after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


Sent = tuple[int, bytes, dict[str, str]]
#: of an answer (status, body, headers), what is sent in its place
Lie = Callable[[int, bytes, dict[str, str]], Sent]


class Hub:
    """The state, and the server on a socket bound before."""

    def __init__(self, bound: socket.socket) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.lies: list[tuple[str, Lie]] = []
        self.log: list[str] = []
        self.tokens = {READ: ("alice", "read"), WRITE: ("alice", "write")}
        self.lock = threading.Lock()
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}), bind_and_activate=False
        )
        server.socket.close()
        server.socket, server.server_address = bound, bound.getsockname()
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who is killed while asking is gone
        bound.listen(16)
        self.server = server
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()

    def fail(self, method: str, path: str, status: int = 0, times: int = 1, **more: Any) -> None:
        """The next `times` requests that match fail."""
        self.faults += [Fault(method, path, status, **more) for _ in range(times)]

    def lie(self, path: str, lie: Lie) -> None:
        """From now on, whoever asks for what matches "METHOD /path" is told this instead."""
        self.lies.append((path, lie))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            found = next((f for f in self.faults if f.method == method and re.search(f.path, path)), None)
            if found is not None:
                self.faults.remove(found)
            return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        fault = self.hub.fault(self.command, path)
        size = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.after is not None:
            self.rfile.read(min(size, fault.after))
            self.hub.log.append(f"{self.command} {path} cut")
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        self.hub.log.append(f"{self.command} {path}" + (f" {fault.status}" if fault else ""))
        if fault is not None:
            return self.refuse(fault.status, "", "no such luck", **fault.headers)
        for pattern, method in _ROUTES:
            if (match := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                with self.hub.lock:
                    return method(self, *match.groups())
        return self.refuse(404, "", f"no route for {self.command} {path}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        headers.setdefault("Content_Length", str(len(body)))
        for pattern, lie in self.hub.lies:
            if re.search(pattern, f"{self.command} {unquote(urlsplit(self.path).path)}"):
                status, body, headers = lie(status, body, headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send(status, body, X_Error_Code=code, X_Error_Message=message, **headers)

    # who asks, and for what
    def user(self) -> tuple[str, str] | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, if it is there and may be seen; else the answer is sent."""
        repo, user = self.hub.repos.get(name), self.user()
        mine = user is not None and user[0] == name.split("/")[0]
        if repo is None or (repo.private and not mine):
            self.refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        elif write and user is None:
            self.refuse(401, "", "Invalid username or password.")
        elif write and not (mine and user[1] == "write"):
            self.refuse(403, "", "Forbidden: you must use a write token of its owner")
        elif repo.gated and not mine:
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return repo
        return None

    def at(self, name: str, revision: str) -> Commit | None:
        """A repository's commit, if it is there and may be seen; else the answer is sent."""
        repo = self.repo(name)
        commit = None if repo is None else repo.at(revision)
        if repo is not None and commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # the API
    def whoami(self) -> None:
        user = self.user()
        if user is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        name, role = user
        access = {"displayName": "test", "role": role}
        return self.json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": access}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        user = self.user()
        if user is None:
            return self.refuse(401, "", "Invalid username or password.")
        name = f"{wanted.get('organization') or user[0]}/{wanted['name']}"
        if user[1] != "write" or name.split("/")[0] != user[0]:
            return self.refuse(403, "", f"You don't have the rights to create a model under the namespace {name}")
        url = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", **url}, 409)
        repo = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repos[name] = repo
        return self.json(url)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            front = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(front, dict) else [{"message": "not a mapping"}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        if repo is None:
            return
        held = repo.commits[-1].files
        files = []
        for file in json.loads(self.body)["files"]:
            assert base64.b64decode(file["sample"]) is not None
            lfs = file["path"].endswith(_LARGE)
            known = held.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if lfs else git_oid(known)
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files})

    def batch(self, name: str) -> None:
        if self.repo(name, write=True) is None:
            return
        wanted = json.loads(self.body)
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
        objects = []
        for each in wanted["objects"]:
            answer = dict(each)
            if each["oid"] not in self.hub.large:
                at = f"http://{self.headers['Host']}/lfs/{each['oid']}"
                answer["actions"] = {"upload": {"href": at}, "verify": {"href": f"{at}/verify"}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "", "the content does not have this checksum")
        self.hub.large[oid] = self.body
        return self.send(200)

    def verify(self, oid: str) -> None:
        wanted = json.loads(self.body)
        if oid != wanted["oid"] or len(self.hub.large.get(oid, b"")) != wanted["size"]:
            return self.refuse(404, "", "object not found")
        return self.json({"message": "ok"})

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repo.commits[-1].oid) != repo.commits[-1].oid:
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[-1].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.refuse(400, "", f"{value['path']}: this LFS object was never uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return self.refuse(404, "EntryNotFound", "A file with this name doesn't exist")
        made = repo.commit(header["summary"], files)
        url = f"http://{self.headers['Host']}/{name}/commit/{made.oid}"
        return self.json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def info(self, name: str, revision: str = "main") -> None:
        commit = self.at(name, revision)
        if commit is None:
            return None
        card = commit.files.get("README.md", b"").decode().split("---")
        facts = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit.oid,
            "private": self.hub.repos[name].private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            "cardData": yaml.safe_load(card[1]) if len(card) > 2 else {},
        }
        return self.json(facts)

    def tree(self, name: str, revision: str) -> None:
        commit = self.at(name, revision)
        if commit is None:
            return None
        entries = []
        for path, data in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path}
            if path.endswith(_LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return self.json(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.at(name, revision)
        if commit is None:
            return None
        if path not in commit.files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.oid)
        data = commit.files[path]
        if path.endswith(_LARGE):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.large[oid] = data
            at = f"http://localhost:{self.server.server_address[1]}/lfs/{oid}"  # large files are another host's
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit.oid}
            return self.send(302, Location=at, **linked)
        return self.content(data, git_oid(data), X_Repo_Commit=commit.oid)

    def download(self, oid: str) -> None:
        self.content(self.hub.large[oid], oid)

    def content(self, data: bytes, etag: str, **headers: str) -> None:
        headers = {"ETag": f'"{etag}"', "Accept_Ranges": "bytes", **headers}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if self.command == "GET" and span is not None:
            begin = int(span[1])
            of = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[begin:], Content_Range=of, **headers)
        return self.send(200, data, **headers)


_NAME, _OID = r"([^/ ]+/[^/ ]+)", r"([0-9a-f]{64})"
_ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"PUT /lfs/{_OID}", _Handler.put),
    (rf"POST /lfs/{_OID}/verify", _Handler.verify),
    (rf"(?:GET|HEAD) /lfs/{_OID}", _Handler.download),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]

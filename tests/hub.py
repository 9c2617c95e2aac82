"""A hub of our own: what huggingface_hub asks of the Hugging Face hub, answered from memory on this machine."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@dataclass
class Hub:
    """What the hub holds: of each repository whether it is private and its commits, each all files by name."""

    url: str = ""
    repositories: dict = field(default_factory=dict)
    private: dict = field(default_factory=dict)
    blobs: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    read_only: bool = False

    def files(self, name):
        return self.repositories[name][-1]

    def add(self, name, files, *, private=False):
        self.private[name] = private
        self.repositories.setdefault(name, []).append(files)


@contextmanager
def serving():
    """``with serving() as hub:`` a hub that listens at ``hub.url``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch, url, folder):
    """Make huggingface_hub take a hub for the only one, with a token, and keep what it gets below a folder."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # hf_xet would look for the hub's own storage
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def _commit(name, index):
    return hashlib.sha1(f"{name} {index}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # so that no connection outlives the server

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def visible(self, name):
        return name in self.hub.repositories and (self.known or not self.hub.private[name])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.requests.append((self.command, self.path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.path):
            if not self.visible(found[1]):
                return self.refuse(404, "RepoNotFound")
            known = [_commit(found[1], i) for i in range(len(self.hub.repositories[found[1]]))]
            sha = known[-1] if found[2] in (None, "main") else found[2]
            if sha not in known:
                return self.refuse(404, "RevisionNotFound")
            return self.answer(200, {"id": found[1], "sha": sha, "private": self.hub.private[found[1]], "siblings": []})
        name, revision, path = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path).groups()
        if not self.visible(name):
            return self.refuse(404, "RepoNotFound")
        commits = {_commit(name, i): files for i, files in enumerate(self.hub.repositories[name])}
        revision = _commit(name, len(commits) - 1) if revision == "main" else revision
        if revision not in commits:
            return self.refuse(404, "RevisionNotFound")
        if path not in commits[revision]:
            return self.refuse(404, "EntryNotFound")
        content = commits[revision][path]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, {"ETag": etag, "X-Repo-Commit": revision})

    def do_PUT(self):
        self.hub.requests.append((self.command, self.path))
        self.hub.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200)

    def do_POST(self):
        self.hub.requests.append((self.command, self.path))
        body = self.body()
        if not self.known:
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.hub.read_only:
            return self.refuse(403, "Forbidden")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.hub.repositories
            if not there:
                self.hub.add(name, {}, private=asked.get("visibility") == "private")
            return self.answer(409 if there else 200, {"url": f"{self.hub.url}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            kind = {"Content-Type": "application/vnd.git-lfs+json"}
            return self.answer(200, {"transfer": "basic", "objects": objects}, kind)
        name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if action == "preupload":
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith("safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        files = dict(self.hub.files(name))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repositories[name].append(files)
        oid = _commit(name, len(self.hub.repositories[name]) - 1)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

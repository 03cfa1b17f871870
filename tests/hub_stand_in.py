# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A hub on this machine: as much of the hub's API as `push_to_hub`, `from_pretrained` and `snapshot_download` speak.

    with HubStandIn() as hub, hub.connected(tmp_path / "cache"):
        model.push_to_hub("me/model", token=TOKEN)

Repositories live in memory. Writing and private repositories ask for [`TOKEN`]; a README whose metadata the hub would
refuse is refused. Files of weights go the way of large files (LFS), everything else into the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.hf_api
import transformers.utils.hub
import yaml
from huggingface_hub import constants


TOKEN, USER = "hf_of_the_stand_in", "me"
_LARGE = (".safetensors", ".bin", ".gguf", ".npy", ".model")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    message: str
    files: dict[str, str]  # path -> digest of the content


@dataclass
class Repository:
    """What lies under an id."""

    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, message: str, files: dict[str, str]) -> Commit:
        """Add a commit to a branch."""
        oid = hashlib.sha1(json.dumps([message, files, len(self.commits), branch]).encode()).hexdigest()
        self.branches[branch] = self.commits[oid] = Commit(oid, message, files)
        return self.commits[oid]

    def at(self, revision: str) -> Optional[Commit]:
        """The commit that a branch or a hash names."""
        return self.branches.get(revision) or self.commits.get(revision)


class HubStandIn:
    """The server; a context manager.

    Attributes:
        repositories: By id.
        requests: Method and path of every request, in order.
        url: What `HF_ENDPOINT` is to be.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def read(self, repo_id: str, path: str, revision: str = "main") -> str:
        """A file as text."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None
        return self.contents[commit.files[path]].decode()

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        """Paths in a repository."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None
        return sorted(commit.files)

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process that is to talk to this hub gets, before it imports any library of Hugging Face's."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_CACHE": str(cache),
            "HF_HOME": str(cache),
        }

    @contextmanager
    def connected(self, cache: Path) -> Iterator[None]:
        """Let this process talk to it.

        Args:
            cache: A folder for what is downloaded.
        """
        patches = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
            "HF_TOKEN_PATH": str(cache / "token"),
        }
        with (
            mock.patch.multiple(constants, **patches),
            mock.patch.object(huggingface_hub.hf_api.api, "endpoint", self.url),
            mock.patch.object(transformers.utils.hub, "_hf_api", None),
        ):
            yield


class _Handler(BaseHTTPRequestHandler):
    """One request; `hub` is set in the subclass."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self._read_body()
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                action(self, *match.groups())
                return
        self._json({"error": f"the stand-in has no {self.command} {path}"}, 501)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any, status: int = 200, headers: Optional[dict[str, str]] = None) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, content: bytes, status: int = 200, headers: Optional[dict[str, str]] = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, what: str, headers: Optional[dict[str, str]] = None) -> None:
        self._json({"error": f"{what} not found"}, 404, {"X-Error-Code": f"{what}NotFound", **(headers or {})})

    def _repository(self, repo_id: str, writes: bool = False) -> Optional[Repository]:
        """The repository, or None once the request was refused."""
        repository = self.hub.repositories.get(repo_id)
        if writes and not self._authorised:
            self._json({"error": "Invalid username or password."}, 401)
            return None
        if repository is None or (repository.private and not self._authorised):
            self._missing("Repo")
            return None
        return repository

    # ---- what is asked for

    def create(self) -> None:
        if not self._authorised:
            self._json({"error": "Invalid username or password."}, 401)
            return
        payload = json.loads(self.body)
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            self._json({"error": "You already created this model repo", **answer}, 409)
            return
        private = payload.get("private") or payload.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(private=bool(private))
        repository.commit("main", "initial commit", {})
        self._json(answer)

    def validate(self) -> None:
        """What the hub says of a README's metadata, as far as ours could go wrong."""
        content, errors = json.loads(self.body)["content"], []
        head = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = (yaml.safe_load(head.group(1)) or {}) if head else {}
        bases = data.get("base_model", [])
        for name in bases if isinstance(bases, list) else [bases]:
            if not isinstance(name, str) or _ID.fullmatch(name) is None:
                errors.append({"message": f'"base_model" with value "{name}" is not valid. Use a model id.'})
        if not all(isinstance(tag, str) for tag in data.get("tags") or []):
            errors.append({"message": '"tags" must be an array of strings'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def whoami(self) -> None:
        self._json(
            {"type": "user", "name": USER, "orgs": []} if self._authorised else {}, 200 if self._authorised else 401
        )

    def preupload(self, repo_id: str, revision: str) -> None:
        if self._repository(repo_id, writes=True) is None:
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def large_files(self, repo_id: str) -> None:
        if self._repository(repo_id, writes=True) is None:
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.hub.contents else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._json({"error": "wrong digest"}, 400)
            return
        self.hub.contents[oid] = self.body
        self._bytes(b"")

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id, writes=True)
        if repository is None:
            return
        base, branch = repository.at(revision), revision
        if base is None:
            self._missing("Revision")
            return
        pull_request = None
        if self.query.get("create_pr") == ["1"]:
            repository.pull_requests += 1
            branch = f"refs/pr/{repository.pull_requests}"
            pull_request = f"{self.hub.url}/{repo_id}/discussions/{repository.pull_requests}"
        files, message = dict(base.files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(content).hexdigest()
                self.hub.contents[files[value["path"]]] = content
            elif line["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {path: oid for path, oid in files.items() if not path.startswith(value["path"])}
        done = repository.commit(branch, message, files)
        url = f"{self.hub.url}/{repo_id}/commit/{done.oid}"
        self._json({"success": True, "commitOid": done.oid, "commitUrl": url, "pullRequestUrl": pull_request})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self._repository(repo_id, writes=True)
        if repository is None:
            return
        if name in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        repository.branches[name] = repository.branches["main"]
        self._json({})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            self._missing("Revision")
            return
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = repository.private
        self._json({"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: Optional[str] = None) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            self._missing("Revision")
            return
        prefix, deep = (
            f"{folder}/" if folder else "",
            self.query.get("recursive", ["false"])[0].lower() in ("true", "1"),
        )
        entries: dict[str, dict[str, Any]] = {}
        for path, oid in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :]
            if "/" in inner:
                name = prefix + inner.split("/")[0]
                entries[name] = {"type": "directory", "path": name, "oid": oid[:40]}
            if "/" not in inner or deep:
                size = len(self.hub.contents[oid])
                large = {"lfs": {"oid": oid, "size": size, "pointerSize": 100}} if path.endswith(_LARGE) else {}
                entries[path] = {"type": "file", "path": path, "oid": oid[:40], "size": size, **large}
        if prefix and not entries:
            self._missing("Entry")
            return
        self._json(list(entries.values()))

    def refs(self, repo_id: str) -> None:
        repository = self._repository(repo_id)
        if repository is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
                for name, commit in repository.branches.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        # a pull request's branch has slashes, as files have
        names = (*repository.branches, *repository.commits)
        revision = next((name for name in names if f"{revision}/{path}".startswith(f"{name}/")), revision)
        path = self._path_after(repo_id, revision)
        commit = repository.at(revision)
        if commit is None:
            self._missing("Revision")
            return
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self._missing("Entry", headers)
            return
        content = self.hub.contents[commit.files[path]]
        headers |= {"ETag": f'"{commit.files[path]}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._bytes(content, 200, headers)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._bytes(content[start : end + 1], 206, headers)

    def _path_after(self, repo_id: str, revision: str) -> str:
        return unquote(urlsplit(self.path).path).removeprefix(f"/{repo_id}/resolve/{revision}/")


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), f"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.large_files),
    (("PUT",), r"/lfs/(\w+)", _Handler.store),
    (("POST",), f"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (("POST",), f"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (("GET",), f"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/tree/([^/]+)/?(.+)?", _Handler.tree),
    (("GET",), f"/api/models/{_REPO}/refs", _Handler.refs),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("GET", "HEAD"), f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]

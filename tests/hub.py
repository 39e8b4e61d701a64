"""A Hub for tests: everything up to the network is huggingface_hub's own, and behind it is a dict of files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import _http

http = getattr(_http, "httpx2", None) or _http.httpx  # huggingface_hub 2 and 1


class Hub:
    """Answers the requests of uploads and downloads. `repos[name][path]` are the bytes of one file, `repos[name@v2]` the
    files of a revision.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.forbidden = ""
        """Part of the addresses that are answered with 403."""

    def put(self, name: str, folder: Path, base: str | None = None) -> None:
        """The files of a folder as a repository; of an adapter with `base` as the model that it names."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        if base:
            config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": base}
            files["adapter_config.json"] = json.dumps(config).encode()
        self.repos[name] = files

    def answer(self, request: Any) -> Any:
        path, method = request.url.path, request.method
        if self.forbidden and self.forbidden in path:
            return http.Response(403, json={"error": "no rights"})
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(name, {})
            return http.Response(200, json={"url": f"https://huggingface.co/{name}"})
        if path == "/api/validate-yaml":
            base = re.search(r"^base_model: (.*)", json.loads(request.content)["content"], re.M)
            if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1].strip("'\"")):
                said = '"base_model" must be the name of a model on the Hub'
                return http.Response(400, json={"errors": [{"message": said}], "warnings": []})
            return http.Response(200, json={"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tree|revision)/(.+)", path):
            return getattr(self, found[2])(self.at(found[1], found[3]), request)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(self.at(found[1], found[2]), found[3], method)
        return http.Response(404, json={"error": f"{method} {path}"})

    def at(self, name: str, revision: str) -> str:
        """The key of a revision, which is also known by its commit."""
        pinned = (other for other in self.repos if other.startswith(f"{name}@"))
        return next((other for other in pinned if revision in (other.partition("@")[2], self.sha(other))), name)

    def preupload(self, name: str, request: Any) -> Any:
        files = json.loads(request.content)["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        return http.Response(200, json={"files": modes})

    def commit(self, name: str, request: Any) -> Any:
        for line in request.content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"https://huggingface.co/{name}/commit/{self.sha(name)}"
        return http.Response(200, json={"commitUrl": url, "commitOid": self.sha(name), "success": True})

    def revision(self, name: str, request: Any) -> Any:
        if name not in self.repos:
            return self.missing("Repo", "Repository not found")
        siblings = [{"rfilename": path} for path in self.repos[name]]
        return http.Response(200, json={"id": name, "sha": self.sha(name), "siblings": siblings})

    def tree(self, name: str, request: Any) -> Any:
        files = self.repos.get(name, {}).items()
        return http.Response(
            200,
            json=[
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files
            ],
        )

    def file(self, name: str, path: str, method: str) -> Any:
        if name not in self.repos:
            return self.missing("Repo", "Repository not found")
        data = self.repos[name].get(path)
        if data is None:
            return self.missing("Entry", "Entry not found")
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.sha(name)}
        headers["Content-Length"] = str(len(data))
        return http.Response(200, headers=headers, content=b"" if method == "HEAD" else data)

    def missing(self, what: str, said: str) -> Any:
        return http.Response(404, headers={"X-Error-Code": f"{what}NotFound"}, json={"error": said})

    def sha(self, name: str) -> str:
        """Of the repository as it is: another commit for other contents."""
        parts = sorted(self.repos[name].items())
        return hashlib.sha1(repr([(path, hashlib.sha1(data).hexdigest()) for path, data in parts]).encode()).hexdigest()


@contextmanager
def hub(monkeypatch: Any, cache: Any) -> Iterator[Hub]:
    """While inside, whatever huggingface_hub sends reaches this Hub alone."""
    found = Hub()
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache)}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(found.answer)))
    huggingface_hub.close_session()
    try:
        yield found
    finally:
        huggingface_hub.set_client_factory(_http.default_client_factory)
        huggingface_hub.close_session()

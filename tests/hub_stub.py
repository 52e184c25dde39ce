"""A Hub of one process: the part of the HTTP API that creating a repository and uploading a folder use."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from huggingface_hub.utils import validate_repo_id


LICENSES = {"apache-2.0", "mit", "llama3.1", "gemma", "cc-by-4.0", "cc-by-nc-4.0", "other"}
# As the `.gitattributes` of a new repository has it, as far as these tests need it.
LARGE_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def front_matter_errors(card: str) -> list[str]:
    """What the Hub would object to in a card's metadata: a small part of its checks."""
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if not match:
        return ["no front matter"]
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [str(error)]
    errors = []
    for key in ("base_model", "datasets"):
        values = metadata.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except ValueError as error:
                errors.append(f"{key}: {error}")
    if "license" in metadata and metadata["license"] not in LICENSES:
        errors.append(f"license: {metadata['license']!r} is unknown")
    for key in ("library_name", "pipeline_tag", "model_name"):
        if key in metadata and not isinstance(metadata[key], str):
            errors.append(f"{key}: not a string")
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append("tags: not all are strings")
    errors += [f"{key}: empty" for key, value in metadata.items() if value in (None, "", [])]
    return errors


@dataclass
class HubStub:
    """
    The server, as a context manager, and what it was sent.

    Args:
        user (`str`, *optional*, defaults to `"tester"`):
            Namespace of repositories created without one.
        closed (`str`, *optional*, defaults to `"closed"`):
            Namespace without write access: requests for its repositories are answered with 403.

    Attributes:
        files (`dict[str, dict[str, bytes]]`):
            Content of each repository, by path.
        commits (`dict[str, list[str]]`):
            Messages of the commits to each repository.
        visibility (`dict[str, str]`):
            Visibility that each repository was created with.
        unknown (`list[str]`):
            Requests that the stub does not know: an upload should not need them.
        tokens (`set[str]`):
            Tokens of all requests.
    """

    user: str = "tester"
    closed: str = "closed"
    files: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    visibility: dict = field(default_factory=dict)
    unknown: list = field(default_factory=list)
    tokens: set = field(default_factory=set)
    blobs: dict = field(default_factory=dict)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes):
        """Status and answer to a request."""
        payload = json.loads(body) if path == "/api/repos/create" else {}
        if payload.get("organization") == self.closed or f"/{self.closed}/" in path:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            name = f"{payload.get('organization') or self.user}/{payload['name']}"
            self.visibility[name] = payload.get("visibility", "public")
            self.files[name], self.commits[name] = {}, []
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            errors = front_matter_errors(json.loads(body)["content"])
            return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT" and path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.blobs[oid] = body
            return 200, {}
        if "/commit/" in path:
            return 200, self._commit(path, [json.loads(line) for line in body.splitlines()])
        self.unknown.append(f"{method} {path}")
        return 404, {"error": "not found"}

    def _commit(self, path: str, lines: list[dict]) -> dict:
        repo = path.removeprefix("/api/models/").split("/commit/")[0]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits[repo].append(value["summary"])
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.blobs[value["oid"]]
        oid = f"{len(self.commits[repo]):040x}"
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def _handle(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "Authorization" in self.headers:
            self.hub.tokens.add(self.headers["Authorization"].removeprefix("Bearer "))
        status, answer = self.hub.answer(self.command, self.path.split("?")[0], body)
        answer = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args):
        pass

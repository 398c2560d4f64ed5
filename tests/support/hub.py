"""A Hub of one's own on this machine: the endpoints that uploads and downloads of models use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_the_tests"


class LocalHub:
    """
    Attributes:
        repos: The files of every repository; `private` the private ones.
        objects: Large files by their SHA-256, as they were uploaded.
        requests: Method and path of all that was asked.
        etags: What it states as the hash of a file, if not its sha256.
        fault: `{part of a path: status}` to answer with, perhaps with more headers `(status, {name: value})`, or
            `"cut"` to close the connection while a body arrives, or `"half"` to close it, once, after a half of the
            answer to a GET.
        ranges: The `Range` of every request that has one.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.etags: dict[str, str] = {}
        self.fault: dict[str, int | str | tuple[int, dict[str, str]]] = {}
        self.ranges: list[str] = []

    def __enter__(self):
        hub = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit_id(self, repo: str) -> str:
        """It changes with the content, as that of git."""
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(self.repos[repo].items())})
        return hashlib.sha1(content.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    is_halved = False

    def log_message(self, *_):
        pass

    def reply(self, body, status: int = 200, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.is_halved:
            self.wfile.write(body[: len(body) // 2])
            self.is_halved, self.close_connection = False, True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        for part, fault in list(self.hub.fault.items()):
            if fault == "half" and self.command == "GET" and part in path:
                self.is_halved = True
                del self.hub.fault[part]
            elif fault != "half" and part in f"{self.command} {path}":
                if fault == "cut":
                    self.rfile.read(min(10, int(self.headers.get("Content-Length", 0))))
                    self.close_connection = True
                    self.connection.close()
                    return
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                # As a proxy that repeats what it was sent.
                said = f"fault {status} of {self.headers.get('Authorization')}"
                return self.reply({"error": said}, status, **headers)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for method, pattern, answer in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                if answer not in (_Handler.upload, _Handler.resolve) and not self.is_known():
                    return self.reply({"error": "Invalid username or password."}, 401)
                return answer(self, body, *match.groups())
        self.reply({"error": f"no such endpoint: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self, body) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return self.reply({"error": "You already created this model repo", "url": url}, 409)
        self.hub.repos[repo] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        self.reply({"url": url})

    def validate(self, body) -> None:
        header = json.loads(body)["content"].split("---\n")[1]
        fields = yaml.safe_load(header)
        if json.loads(body)["repoType"] == "space":
            return self.reply({"errors": [] if fields.get("sdk") else [{"message": "sdk"}], "warnings": []})
        known = {"image-classification", "image-feature-extraction", "image-segmentation", "object-detection"}
        errors = [] if fields.get("pipeline_tag") in known else [{"message": "pipeline_tag"}]
        errors += [] if isinstance(fields.get("tags"), list) else [{"message": "tags"}]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, repo: str) -> None:
        files = json.loads(body)["files"]
        mode = {True: "lfs", False: "regular"}
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": mode[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        )

    def batch(self, body, repo: str) -> None:
        objects = [
            entry | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, body, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply({"error": "the content is not that of the hash"}, 422)
        self.hub.objects[oid] = body
        self.reply({})

    def commit(self, body, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.hub.repos[repo][value["path"]]
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit_id(repo)
        place = f"spaces/{repo}" if "/api/spaces/" in self.path else repo
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{place}/commit/{oid}"})

    def info(self, body, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
        commit = self.hub.commit_id(repo)
        self.reply({"id": repo, "sha": commit, "private": repo in self.hub.private, "siblings": siblings, "tags": []})

    def resolve(self, body, repo: str, file: str) -> None:
        if repo not in self.hub.repos or (repo in self.hub.private and not self.is_known()):
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        commit = {"X_Repo_Commit": self.hub.commit_id(repo)}
        if file not in self.hub.repos[repo]:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **commit)
        content = self.hub.repos[repo][file]
        etag = self.hub.etags.get(file, hashlib.sha256(content).hexdigest())
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.hub.ranges.append(match[0])
            start, end = int(match[1]), len(content)
            commit["Content_Range"] = f"bytes {start}-{end - 1}/{end}"
            return self.reply(content[start:], 206, ETag=f'"{etag}"', **commit)
        self.reply(content, ETag=f'"{etag}"', **commit)

    def tree(self, body, repo: str) -> None:
        self.reply([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.hub.repos.get(repo, {}).items()])  # fmt: skip


_REPO = r"([\w.-]+/[\w.-]+)"
_KIND = "(?:models|spaces)"
_ROUTES = (
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/{_KIND}/{_REPO}/preupload/main", _Handler.preupload),
    (("POST",), rf"/api/{_KIND}/{_REPO}/commit/main", _Handler.commit),
    (("POST",), rf"/(?:spaces/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/objects/([0-9a-f]{64})", _Handler.upload),
    (("GET",), rf"/api/{_KIND}/{_REPO}(?:/revision/[^/]+)?", _Handler.info),
    (("GET",), rf"/api/{_KIND}/{_REPO}/tree/[^/]+", _Handler.tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/[^/]+/(.+)", _Handler.resolve),
)

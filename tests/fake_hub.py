"""A Hub on this machine: the part of its HTTP API that huggingface_hub asks for to publish, list and download models.

`FakeHub` keeps everything in memory. What can go wrong is switched on from outside: `cut_uploads` and `cut_downloads`
break that many connections half-way, `tamper(repo, name, content)` has other bytes served under the recorded hash.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_fake_hub"
LARGE = 100_000  # bytes from which a file is stored by its sha256; weights always are


@dataclass
class File:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def add(self, ref: str, files: dict[str, File]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}  # instead of the object of this hash
        self.requests: list[str] = []
        self.cut_uploads = self.cut_downloads = 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, File]:
        return self.repos[repo].commits[self.repos[repo].refs[revision]]

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """A public repository of another user with these files."""
        made = {name: File(content, name.endswith(".safetensors")) for name, content in files.items()}
        self.repos.setdefault(repo, Repo(private=False)).add("main", made)

    def tamper(self, repo: str, name: str, content: bytes) -> None:
        self.served[self.files(repo)[name].oid] = content


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        self.server.requests.append(f"{self.command} {path}")
        if self.command == "PUT" and self.server.cut_uploads:
            self.server.cut_uploads -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return handle(self, **match.groupdict())
        self._error(404, f"no such route: {self.command} {path}", "EntryNotFound")

    # ---- answers ----------------------------------------------------------------------------------------------

    def _json(self, content, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | headers)

    def _error(self, status: int, message: str, code: str = "", **headers: str) -> None:
        told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, **told, **headers)

    def _send(self, content: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._error(401, "Invalid username or password.")
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._error(401 if repo is None else 404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def _commit(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        sha = repo.sha(revision)
        if sha is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repo, sha

    # ---- repositories -----------------------------------------------------------------------------------------

    def here(self) -> None:
        self._send(b"a Hub")

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        if name in self.server.repos:
            self._json({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            return
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.add("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self._json({"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        if found is None or not self._may_write():
            return
        if revision in found.refs:
            self._error(409, f"Reference already exists: {revision}")
            return
        found.refs[revision] = found.refs["main"]
        self._json({})

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self._commit(repo, revision):
            holder, sha = found
            siblings = [{"rfilename": name} for name in holder.commits[sha]]
            self._json({"id": repo, "sha": sha, "private": holder.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            self._json([_entry(name, file) for name, file in found[0].commits[found[1]].items()])

    def paths_info(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            files, asked = found[0].commits[found[1]], parse_qs(self.body.decode())["paths"]
            self._json([_entry(name, files[name]) for name in asked if name in files])

    # ---- uploads ----------------------------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            front_matter = yaml.safe_load(content.split("---")[1])
            problem = "" if isinstance(front_matter, dict) else "front matter is no mapping"
        except (yaml.YAMLError, IndexError) as error:
            problem = str(error)
        errors = [{"message": problem}] if problem else []
        self._json({"errors": errors, "warnings": []}, 400 if problem else 200)

    def preupload(self, repo: str, revision: str) -> None:
        if not self._may_write() or (found := self._commit(repo, revision)) is None:
            return
        there, answer = found[0].commits[found[1]], []
        for file in json.loads(self.body)["files"]:
            name, large = file["path"], file["path"].endswith(".safetensors") or file["size"] >= LARGE
            known = {"oid": there[name].oid} if name in there else {}
            answer.append({"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | known)
        self._json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        if not self._may_write():
            return
        objects = []
        for each in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{each['oid']}"}
            missing = each["oid"] not in self.server.objects
            verify = {"href": f"{self.server.url}/lfs-verify"}
            objects.append(each | ({"actions": {"upload": upload, "verify": verify}} if missing else {}))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "the bytes are not those of this sha256")
            return
        self.server.objects[oid] = self.body
        self._json({})

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            self._error(404, "the object was not uploaded")
            return
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        if not self._may_write() or (found := self._commit(repo, revision)) is None:
            return
        holder, sha = found
        files = dict(holder.commits[sha])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        self._error(400, f"{value['path']} was not uploaded")
                        return
                    files[value["path"]] = File(self.server.objects[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
        answer = {}
        ref = revision
        if self.query.get("create_pr") == ["1"]:
            holder.pull_requests += 1
            ref = f"refs/pr/{holder.pull_requests}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{holder.pull_requests}"
        made = holder.add(ref, files)
        self._json(answer | {"commitOid": made, "commitUrl": f"{self.server.url}/{repo}/commit/{made}"})

    # ---- downloads --------------------------------------------------------------------------------------------

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        holder, sha = found
        commit = {"X-Repo-Commit": sha}
        if name not in holder.commits[sha]:
            self._error(404, "Entry not found", "EntryNotFound", **commit)
            return
        file = holder.commits[sha][name]
        content = self.server.served.get(file.oid, file.content)
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.oid}"'} if file.large else {}
        headers = {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"} | linked | commit
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-")).group(1))
        if self.command == "GET" and file.large and self.server.cut_downloads:
            self.server.cut_downloads -= 1
            self.send_response(206 if start else 200)
            for header, value in (headers | {"Content-Length": str(len(content) - start)}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(content[start:], 206 if start else 200, headers)


def _entry(name: str, file: File) -> dict:
    entry = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
    return entry | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.large else {})


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>.+)"
ROUTES = (
    ("HEAD GET", "/", Handler.here),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("POST", f"/api/models/{REPO}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("HEAD GET", f"/{REPO}/resolve/(?P<revision>refs/[^/]+/[^/]+|[^/]+)/(?P<name>.+)", Handler.resolve),
)

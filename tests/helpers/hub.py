"""A hub like HuggingFace's on this machine: listing, large files behind a redirect to another host, ranges, faults."""

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO, COMMIT = "deepseek-ai/DeepSeek-V3.1-Base", "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Args:
        files: content by name.
        large: names that are LFS files.
        breaks: {name: [bytes sent before the line breaks, one for each of the next answers]}.
        wrong: {name: answers whose content has one byte changed}.
        bytes_a_second: of a large file; None is as fast as it goes.
    """

    files: dict[str, bytes]
    large: set[str]
    token: str | None = None
    breaks: dict[str, list[int]] = field(default_factory=dict)
    wrong: Counter = field(default_factory=Counter)
    bytes_a_second: float | None = None
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)  # (method, path, range, authorization)
    sent: Counter = field(default_factory=Counter)

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                answer(hub, self)

            def do_GET(self):
                answer(hub, self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host, to which no token may go
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, name: str) -> list[str]:
        """The ranges that were asked for of a file's content."""
        path = f"/cdn/{name}" if name in self.large else f"/{REPO}/resolve/{COMMIT}/{name}"
        return [byte_range for method, asked, byte_range, _ in self.asked if method == "GET" and asked == path]


def answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    """One request."""
    path = unquote(urlsplit(request.path).path)
    authorization = request.headers.get("Authorization", "")
    hub.asked.append((request.command, path, request.headers.get("Range", ""), authorization))
    api, content = f"/api/models/{REPO}", f"/{REPO}/resolve/{COMMIT}/"
    if path.startswith("/cdn/"):
        send(hub, request, path.removeprefix("/cdn/"))
    elif hub.token and authorization != f"Bearer {hub.token}":
        refuse(request, 401, "GatedRepo")
    elif path == api or path.startswith(f"{api}/revision/"):
        revision = path.removeprefix(api).removeprefix("/revision/")
        known = revision in ("", "main", COMMIT)
        listing(hub, request) if known else refuse(request, 404, "RevisionNotFound")
    elif not path.startswith(content):
        refuse(request, 401, "RepoNotFound")
    elif path.removeprefix(content) in hub.large:
        redirect(hub, request, path.removeprefix(content))
    else:
        send(hub, request, path.removeprefix(content))


def refuse(request: BaseHTTPRequestHandler, code: int, name: str) -> None:
    request.send_response(code)
    request.send_header("X-Error-Code", name)
    request.send_header("Content-Length", "0")
    request.end_headers()


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    siblings = []
    for name, content in hub.files.items():
        item = {"rfilename": name, "size": len(content), "blobId": git_name(content)}
        if name in hub.large:
            item["blobId"] = git_name(b"version https://git-lfs.github.com/spec/v1")  # the pointer's
            digest = hashlib.sha256(content).hexdigest()
            item["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        siblings.append(item)
    body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


def redirect(hub: Hub, request: BaseHTTPRequestHandler, name: str) -> None:
    content = hub.files[name]
    request.send_response(302)
    request.send_header("Location", f"{hub.cdn}/cdn/{name}")
    request.send_header("X-Repo-Commit", COMMIT)
    request.send_header("X-Linked-Size", str(len(content)))
    request.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
    request.send_header("Content-Length", "0")
    request.end_headers()


def send(hub: Hub, request: BaseHTTPRequestHandler, name: str) -> None:
    whole = hub.files[name]
    byte_range = request.headers.get("Range", "")
    first = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range else 0
    content = whole[first:]
    if request.command == "GET" and hub.wrong[name] > 0:
        hub.wrong[name] -= 1
        content = bytes([content[0] ^ 1]) + content[1:]
    request.send_response(206 if byte_range else 200)
    if byte_range:
        request.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
    request.send_header("X-Repo-Commit", COMMIT)
    request.send_header("ETag", f'"{git_name(whole)}"')
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "HEAD":
        return
    breaks = hub.breaks.get(name)
    stop = breaks.pop(0) if breaks else len(content)
    piece = max(int(hub.bytes_a_second / 50), 1) if hub.bytes_a_second and name in hub.large else 1 << 16
    for start in range(0, min(stop, len(content)), piece):
        part = content[start : min(start + piece, stop)]
        try:
            request.wfile.write(part)
        except OSError:
            return
        hub.sent[name] += len(part)
        if hub.bytes_a_second and name in hub.large:
            time.sleep(0.02)
    if stop < len(content):
        request.close_connection = True
        request.connection.close()

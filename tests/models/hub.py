"""A Hugging Face hub on the loopback, that serves folders as repositories."""

import hashlib
import http.server
import json
import re
import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """The server's URL, and what it was asked for: `METHOD path`."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            body, refusal = _found(repositories, path)
            self.send_response(404 if refusal else 200)
            if refusal:
                self.send_header("X-Error-Code", refusal)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def _found(repositories: Mapping[str, Path], path: str) -> tuple[bytes, str]:
    """What the hub's API has at a path, or the code of its refusal."""
    for name, folder in repositories.items():
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        if re.fullmatch(rf"/api/models/{name}/revision/(?!main|{COMMIT}).*", path):
            return b"", "RevisionNotFound"
        if re.fullmatch(rf"/api/models/{name}(/revision/\w+)?", path):
            siblings = [{"rfilename": file} for file in files]
            return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), ""
        if path.startswith(f"/api/models/{name}/tree/"):
            return json.dumps([_entry(file, body) for file, body in files.items()]).encode(), ""
        if found := re.fullmatch(rf"/{name}/resolve/\w+/([\w.-]+)", path):
            return (files[found[1]], "") if found[1] in files else (b"", "EntryNotFound")
    return b"", "RepoNotFound"


def _entry(name: str, body: bytes) -> dict[str, object]:
    return {
        "type": "file",
        "oid": hashlib.sha1(body).hexdigest(),
        "size": len(body),
        "path": name,
    }

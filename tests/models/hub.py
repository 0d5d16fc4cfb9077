"""A Hugging Face hub on the loopback, that serves folders as repositories."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.models.loopback import Request, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """The server's URL, and what it was asked for: `METHOD path`."""

    def answer(request: Request) -> None:
        body, refusal = _found(repositories, request.path.partition("?")[0])
        request.send_response(404 if refusal else 200)
        if refusal:
            request.send_header("X-Error-Code", refusal)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    with serving(answer) as server:
        yield server


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

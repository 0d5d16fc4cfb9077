"""A bad network: stands before a server of this machine, and does to requests what it is told."""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from batchclf.images.buckets import open_bucket
from tests.buckets import Server, running_server


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one request."""

    delay_s: float = 0.0
    status: int | None = None
    """Answered in place of the server."""
    code: str = "SlowDown"
    """Of the error, as S3 has it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks: Literal["", "reset", "torn", "stuck"] = ""
    """The connection: reset at once, cut in the middle of the content, or never answered."""


Decide = Callable[[str, str], Fault | None]
"""What is to become of a request, by its method and its path."""


class Proxy(ThreadingHTTPServer):
    """Stands before a server and does to requests what it is told."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = upstream_port
        self.decide: Decide = lambda method, path: None
        self.requests: list[tuple[str, str, float]] = []
        self.ended = threading.Event()
        self.num_at_once = 0
        self.most_at_once = 0
        self._counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """What was asked, and what was to be done."""
        self.requests.clear()
        self.most_at_once = 0
        self.decide = lambda method, path: None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One more request within."""
        with self._counting:
            self.num_at_once += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            yield
        finally:
            with self._counting:
                self.num_at_once -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no errors here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, time.monotonic()))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.decide(self.command, self.path) or Fault()
        with self.server.counted():
            time.sleep(fault.delay_s)
        if fault.breaks == "stuck":
            self.server.ended.wait()
        if fault.breaks in ("reset", "stuck"):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault.status is not None:
            body = f"<Error><Code>{fault.code}</Code><Message>no</Message></Error>".encode()
            self._answer(fault.status, fault.headers, b"" if self.command == "HEAD" else body)
            return
        status, headers, body = self._ask(content)
        self._answer(status, headers, body[: len(body) // 2] if fault.breaks == "torn" else body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _ask(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
        try:
            upstream.request(self.command, self.path, content, dict(self.headers.items()))
            found = upstream.getresponse()
            dropped = ("connection", "transfer-encoding", "date", "server")
            headers = {k: v for k, v in found.getheaders() if k.lower() not in dropped}
            return found.status, headers, found.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), **headers}
        for key, value in sent.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        if len(body) < int(sent["Content-Length"]) and self.command == "GET":
            self.close_connection = True


@contextmanager
def proxied(port: int) -> Iterator[Proxy]:
    """A proxy before a port of this machine."""
    with Proxy(port) as proxy:
        serving = threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        try:
            yield proxy
        finally:
            proxy.ended.set()
            proxy.shutdown()
            serving.join()


NAME, OTHER = "bucket", "other"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of moto's server, and the proxy before it."""

    proxy: Proxy
    server: Server

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {**self.server.env, "AWS_ENDPOINT_URL": self.proxy.url}

    def put(self, key: str, content: bytes, name: str = NAME) -> None:
        """Put an object there; the key may be whatever S3 takes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream_port)
        try:
            quoted = "".join(
                chr(byte)
                if (chr(byte).isalnum() and byte < 128) or chr(byte) in "/-._~"
                else f"%{byte:02X}"
                for byte in key.encode()
            )
            connection.request("PUT", f"/{name}/{quoted}", content, {"x-amz-acl": "public-read"})
            assert connection.getresponse().status == 200, key
        finally:
            connection.close()

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Put all files of a folder there."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@contextmanager
def proxied_bucket() -> Iterator[Bucket]:
    """A bucket; the environment of this process leads to it, by way of a proxy."""
    with running_server() as server, pytest.MonkeyPatch.context() as patch:
        server.client.create_bucket(Bucket=OTHER)
        port = int(server.url.rpartition(":")[2])
        with proxied(port) as proxy:
            bucket = Bucket(proxy, server)
            # So that a listing takes several requests.
            for key, value in {**bucket.env, "MOTO_S3_DEFAULT_MAX_KEYS": "7"}.items():
                patch.setenv(key, value)
            patch.delenv("AWS_SKIP_SIGNATURE", raising=False)
            open_bucket.cache_clear()  # which a test of this process may have had elsewhere
            yield bucket

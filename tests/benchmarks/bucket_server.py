"""A bucket over a folder, as cheap as Python makes it: what a measurement waits for is not this.

    python -m tests.benchmarks.bucket_server FOLDER PORT

Speaks as much of Amazon's S3 API as reading takes: ListObjectsV2, GET with a range, HEAD. It looks
at no signature. The tests' own server (moto) knows far more, and takes ten times as long for it.
"""

import asyncio
import bisect
import os
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MAX_KEYS = 1000


class Server:
    """Serves the files below a folder as the objects of any bucket."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, _, names in os.walk(root)
            for name in names
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                line, *lines = request.decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value for name, _, value in (x.partition(": ") for x in lines)
                }
                method, target, _ = line.split(" ")
                writer.write(self.answer(method, target, headers.get("range")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, method: str, target: str, span: str | None) -> bytes:
        """A whole answer, head and body."""
        found = urlsplit(target)
        query = parse_qs(found.query)
        if "list-type" in query:
            return answered("200 OK", self.listing(query), "application/xml")
        path = self.root / unquote(found.path).split("/", 2)[2]
        if not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            return answered("404 Not Found", body, "application/xml")
        size, start, stop, status = path.stat().st_size, 0, None, "200 OK"
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), int(last) + 1 if last else None, "206 Partial Content"
        with path.open("rb") as file:
            file.seek(start)
            body = file.read() if stop is None else file.read(stop - start)
        more = f'ETag: "{size}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
        if span:
            more += f"Content-Range: bytes {start}-{start + len(body) - 1}/{size}\r\n"
        return answered(status, body, "application/octet-stream", more, is_head=method == "HEAD")

    def listing(self, query: dict[str, list[str]]) -> bytes:
        """One page of ListObjectsV2."""
        prefix, after = (query.get(name, [""])[0] for name in ("prefix", "start-after"))
        after = query.get("continuation-token", [after])[0]
        max_keys = min(MAX_KEYS, int(query.get("max-keys", [str(MAX_KEYS)])[0]))
        at = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, after))
        page = [key for key in self.keys[at : at + max_keys] if key.startswith(prefix)]
        is_cut = at + max_keys < len(self.keys) and self.keys[at + max_keys].startswith(prefix)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(self.root / key).stat().st_size}</Size>"
            '<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"x"</ETag></Contents>'
            for key in page
        )
        more = (
            f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        )
        return (
            f"<ListBucketResult><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}{rows}</ListBucketResult>"
        ).encode()


def answered(
    status: str, body: bytes, kind: str, more: str = "", *, is_head: bool = False
) -> bytes:
    """Head and body of an answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + (b"" if is_head else body)


async def main(folder: Path, port: int) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(Server(folder).serve, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))

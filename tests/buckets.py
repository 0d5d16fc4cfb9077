"""A real S3 API on this machine, and what a test needs to look into it."""

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


@dataclass(frozen=True, slots=True)
class Server:
    """A server with one bucket, `bucket`."""

    url: str

    @property
    def env(self) -> Mapping[str, str]:
        """What a process needs to know of it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
        }

    @property
    def client(self) -> Any:
        """boto3's client, which the product does not use."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
        )

    def objects(self, prefix: str) -> dict[str, bytes]:
        """All that lies below a prefix, by the rest of the name."""
        client = self.client
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return {
            key.removeprefix(prefix): client.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys
        }


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that is empty but for its bucket."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        found = Server(f"http://{host}:{port}")
        # All servers of a process hold the same objects.
        reset = urllib.request.Request(f"{found.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()
        found.client.create_bucket(Bucket="bucket")
        yield found
    finally:
        server.stop()

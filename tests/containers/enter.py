"""Starts a container as an engine would, from new namespaces: `python enter.py CONTAINER_JSON`.

The process becomes the image's entry point: PID 1, with a read-only root, volumes and a user of
its own. Wants root, and `unshare --mount --pid --fork` before it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(container: dict[str, Any]) -> None:
    """`container`: root, command, env, cwd, user, volumes, anonymous_volumes."""
    root = Path(container["root"])
    mount("--make-rprivate", "/")
    mount("--bind", root, root)
    mount("-t", "proc", "proc", root / "proc")
    mount("--rbind", "/dev", root / "dev")
    mount("--rbind", "/sys", root / "sys")
    for target in container["anonymous_volumes"]:
        place = root / target.lstrip("/")
        found = place.stat()  # an engine's new volume has the owner and mode that the image gives
        options = f"mode={found.st_mode & 0o7777:o},uid={found.st_uid},gid={found.st_gid}"
        mount("-t", "tmpfs", "-o", options, "tmpfs", place)
    for source, target in container["volumes"].items():
        place = root / target.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        mount("--bind", source, place)
    mount("-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir(container["cwd"])
    uid, gid = container["user"]
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    command, environment = container["command"], container["env"]
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        sys.exit(f"{command[0]}: not found in {environment['PATH']}")
    os.execve(program, command, environment)


def mount(*arguments: str | Path) -> None:
    """`mount`, which says itself what went wrong."""
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

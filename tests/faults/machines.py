"""Processes that seem to run on other machines, without a common flock, or on a slow file system.

A preloaded library (machine.c, compiled with gcc) answers for the kernel.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.calls import compiled

Locks = Literal["flock", "no flock", "own machines"]
"""What keeps processes apart: the kernel; nothing (ENOSYS); each machine's kernel by itself."""
LOCKS: tuple[Locks, ...] = ("flock", "no flock", "own machines")


@dataclass(frozen=True, slots=True)
class Machines:
    """The library, and what it answers."""

    library: Path

    def environment(self, locks: Locks, number: int = 0) -> dict[str, str]:
        """Of a process, the `number`-th one: where each has a machine of its own, on that one."""
        found = {"LD_PRELOAD": str(self.library)}
        if locks == "no flock":
            found["MACHINE_FLOCK"] = "none"
        elif locks == "own machines":
            boot_id = self.library.with_name(f"boot_id-{number}")
            boot_id.write_text(f"{number:08x}-0000-4000-8000-000000000000\n")
            found |= {
                "MACHINE_FLOCK": "own",
                "MACHINE_NAME": f"machine-{number}",
                "MACHINE_BOOT_ID": str(boot_id),
            }
        return found

    def slow_names(self, given: Path, each_us: int) -> dict[str, str]:
        """Where each name of a folder or a list takes so long to be read."""
        return self._slow(str(given.resolve()), each_us)

    def slow_files(self, folder: Path, each_us: int) -> dict[str, str]:
        """Where each file of a folder takes so long to be read."""
        return self._slow(f"{folder.resolve()}/", each_us)

    def _slow(self, what: str, each_us: int) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self.library),
            "MACHINE_SLOW": what,
            "MACHINE_SLOW_US": str(each_us),
        }


def make_machines(folder: Path) -> Machines:
    """The library, compiled into `folder`.

    Raises:
        FileNotFoundError: there is no gcc.
    """
    return Machines(compiled(Path(__file__).with_name("machine.c"), folder))

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

    def environment(
        self, locks: Locks, number: int = 0, slow: Path | None = None, slow_us: int = 0
    ) -> dict[str, str]:
        """Of a process, the `number`-th one: where each has a machine of its own, on that one.

        `slow`: a folder or a list whose names take `slow_us` longer to be read, each.
        """
        found = {"LD_PRELOAD": str(self.library)}
        if slow is not None:
            found |= {"MACHINE_SLOW": str(slow.resolve()), "MACHINE_SLOW_US": str(slow_us)}
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


def make_machines(folder: Path) -> Machines:
    """The library, compiled into `folder`.

    Raises:
        FileNotFoundError: there is no gcc.
    """
    return Machines(compiled(Path(__file__).with_name("machine.c"), folder))

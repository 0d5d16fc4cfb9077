"""What this machine gives us: usable cores, CPU features, memory and CPU time used so far."""

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

_ReadQuota = Callable[[Path], float | None]

CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_tile": "AMX",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
}
"""Flags of /proc/cpuinfo that decide how fast inference is, and their common names."""


def usable_cores() -> int:
    """Cores this process may really use: its affinity, cut down to its cgroup's CPU quota."""
    cores = num_affinity_cores()
    quota = cgroup_cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def num_affinity_cores() -> int:
    """Cores the scheduler may place this process on (taskset, cpusets)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU quota in cores of this process's cgroup or the tightest one around it; None: unlimited.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`); in a container the own cgroup is
    mounted at the top, so the top is looked at as well.
    """
    quotas: list[float] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += _quotas(root / "sys/fs/cgroup", path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
                quotas += _quotas(root / "sys/fs/cgroup" / mount, path, _quota_v1)
    return min(quotas, default=None)


def _quotas(mount: Path, path: str, read: _ReadQuota) -> list[float]:
    folder = mount / path.lstrip("/")
    found: list[float] = []
    while True:
        try:
            quota = read(folder)
        except (OSError, ValueError):  # no such cgroup here, or no quota file in it
            quota = None
        if quota is not None:
            found.append(quota)
        if folder == mount or mount not in folder.parents:
            return found
        folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def cpu_name_and_flags() -> tuple[str, frozenset[str]]:
    """The processor's name and its /proc/cpuinfo flags; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "", frozenset()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts.get("model name", ""), frozenset(facts.get("flags", "").split())


def cpu_seconds() -> float:
    """CPU seconds (user and system) this process has used, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    # getrusage's figure survives exec: it could be that of the parent.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    peak_kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_kib * 1024 / 1e6


def boot_id() -> str:
    """What tells this start of this machine from every other; empty where Linux does not say.

    Source: /proc/sys/kernel/random/boot_id, random(4).
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

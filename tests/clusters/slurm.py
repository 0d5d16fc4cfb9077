"""A Slurm of this machine alone: its control daemon and the daemon of one node, both real."""

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 120.0
"""Beyond which Slurm hangs."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={control_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/node.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""See slurm.conf(5). A credential that soon expires: a job that was queued again waits for that."""


def missing() -> str | None:
    """Why no Slurm can be started here; None: it can."""
    lacking = [one for one in ("slurmctld", "slurmd", "sbatch") if shutil.which(one) is None]
    if lacking:
        return f"Debian's slurmctld and slurmd are not installed ({', '.join(lacking)})"
    return None if os.getuid() == 0 else "slurmd needs root"


@dataclass(frozen=True, slots=True)
class Slurm:
    """What users of a cluster call."""

    environment: dict[str, str]

    def call(self, *arguments: str, cwd: Path | None = None) -> str:
        """One of Slurm's commands; what it prints."""
        done = subprocess.run(
            arguments, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def states(self, job: str) -> list[str]:
        """Of the tasks of an array that are not done."""
        return self.call("squeue", "--noheader", "--array", "-j", job, "-o", "%T").split()

    def wait(self, job: str) -> None:
        """Until none of its tasks waits or runs."""
        ends_at = time.monotonic() + WAIT_S
        while states := self.states(job):
            assert time.monotonic() < ends_at, states
            time.sleep(0.2)

    def exit_codes(self, job: str) -> dict[int, str]:
        """By task, as `0:0`, where it is known still."""
        found = {}
        for line in self.call("scontrol", "show", "job", job, "--oneliner").splitlines():
            fields = dict(one.split("=", 1) for one in line.split() if "=" in one)
            found[int(fields["ArrayTaskId"])] = fields["ExitCode"]
        return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start the daemons; they end with the context."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host, folder=folder, control_port=_free_port(), node_port=_free_port()
        )
    )
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": path}
    with ExitStack() as stack:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            log = stack.enter_context((folder / f"{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        found = Slurm(environment)
        ends_at = time.monotonic() + WAIT_S
        while not _is_idle(found):
            assert time.monotonic() < ends_at, (folder / "slurmctld.log").read_text()
            time.sleep(0.1)
        yield found


def _is_idle(found: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "-o", "%T"],
        env=found.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() == "idle"

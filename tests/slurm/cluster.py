"""A real Slurm of two nodes on this host, with everything it writes in one folder.

munged, slurmctld and two `slurmd -N` run as ordinary processes of the caller: own key, sockets,
ports and state, no cgroups, no accounting database, nothing in /etc or /var. What is started here
is found again by the configuration file in its environment, and nothing else is ended.

    python tests/slurm/cluster.py sinfo        # one command beside the cluster
    python tests/slurm/cluster.py bash         # or a shell, to play in
"""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

NODES = ("node1", "node2")
MARK = "MMTRAIN_TEST_NODE"
WANTED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian keeps the daemons

CONF = """\
ClusterName=mmtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
# a requeued job begins no sooner than its old credential expires: 2 minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE
"""

T = TypeVar("T")


def lacking() -> list[str]:
    """Commands of Slurm and munge that this machine does not have."""
    return [name for name in WANTED if shutil.which(name, path=PATH) is None]


def until(what: str, ask: Callable[[], T], seconds: float = 120, every: float = 0.2) -> T:
    """The first true answer of `ask`; raises TimeoutError when there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
    return answer


class Cluster:
    """Two nodes, `node1` and `node2`, while the `with` block lasts."""

    def __init__(self, folder: Path) -> None:
        """Write the configuration into `folder` (short: a socket's path has 107 characters)."""
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        text = CONF.format(folder=folder, host=host, user=getpass.getuser(), ports=_free_ports(3))
        self.conf.write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to speak to this cluster; no variable of another job."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def __enter__(self) -> Self:
        """Start everything and wait until both nodes are idle."""
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            until("two idle nodes", self._all_idle)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process of the cluster and of its jobs."""
        self.stop()

    def run(self, *command: str, folder: Path | None = None, **environment: str) -> str:
        """Output of one command; raises CalledProcessError with its words."""
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job))
        )

    def node(self, node: str) -> str:
        """A node's state, as in `IDLE`, `DOWN*`."""
        shown = self.run("scontrol", "--oneliner", "show", "node", node)
        return re.findall(r"State=(\S+)", shown)[0]

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start(node, "slurmd", "-D", "-N", node, **{MARK: node})

    def lose_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and all it runs are gone at once."""
        self._daemons.pop(node).kill()
        for pid in self._processes():  # steps inherit the mark of their daemon, tasks have Slurm's
            if node in (_variable(pid, MARK), _variable(pid, "SLURMD_NODENAME")):
                _end(pid, signal.SIGKILL)

    def kill_a_task(self, node: str) -> None:
        """SIGKILL to a rank, as the kernel does when memory runs out."""
        ranks = [
            pid
            for pid in self._processes()
            if _variable(pid, "SLURMD_NODENAME") == node and _variable(pid, "SLURM_STEP_ID") == "0"
        ]
        for pid in ranks:
            _end(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End jobs first, then daemons, then whatever still carries our configuration."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        for _ in range(50):
            left = self._processes()
            for pid in left:
                _end(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.1)
        raise RuntimeError(f"processes of the cluster that do not end: {left}")

    def _start_munge(self) -> None:
        paths = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
            "log-file": "munge.log",
        }
        options = [f"--{name}={self.folder / file}" for name, file in paths.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        until("munge's socket", (self.folder / "munge.socket").exists)

    def _start(self, name: str, *command: str, **environment: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _all_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                said = (self.folder / f"{name}.out").read_text()[-2000:]
                raise RuntimeError(f"{name} ended with {daemon.returncode}: {said}")
        try:
            return all(self.node(node) == "IDLE" for node in NODES)
        except subprocess.CalledProcessError:  # slurmctld does not listen yet
            return False

    def _processes(self) -> list[int]:
        """Living processes that carry our configuration in their environment, but for this one."""
        pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
        conf = str(self.conf)
        return [p for p in pids if p != os.getpid() and _variable(p, "SLURM_CONF") == conf]


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def _variable(pid: int, name: str) -> str | None:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours to read
        return None
    prefix = f"{name}=".encode()
    return next((e[len(prefix) :].decode() for e in entries if e.startswith(prefix)), None)


def _end(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def main() -> int:
    """Run a command beside the cluster; its exit code."""
    if missing := lacking():
        print(f"cluster: no {', '.join(missing)}; apt-get install slurm-wlm munge", file=sys.stderr)
        return 66
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        Cluster(Path(folder)) as cluster,
    ):
        return subprocess.run(sys.argv[1:] or ["sinfo"], env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main())

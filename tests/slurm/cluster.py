"""A real Slurm of several nodes on one machine, for tests: munged, slurmctld and a slurmd a node.

Each node has a network, host name, mounts and process numbers of its own (a network namespace on a bridge), so that a
node can lose its power (SIGKILL to all its processes, cable first) or its network alone. Needs root and Debian's
slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins, munge, iproute2, util-linux. Timers are seconds, not minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PREFIX, _PORT, _NAME = "10.78.0", 16900, "cmp"

_CONF = """\
ClusterName=compress
SlurmctldHost={host}({prefix}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge-run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=30
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=high  Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

_NODE = """\
hostname "$1"; mount --bind "$2/hosts" /etc/hosts
mkdir -p "$2/shm/$1" "$2/spool/$1"; mount -t tmpfs -o mode=1777 tmpfs /dev/shm
exec slurmd -D -N "$1"
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATHS) is None]
    if absent:
        return f"Slurm's programs aren't installed: {', '.join(absent)}"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        return "a node's namespaces need root and CAP_SYS_ADMIN"
    return ""


def without_containers() -> str:
    """Why the cluster has no stand-in for pyxis; empty where it has one."""
    if not Path("/usr/include/slurm/spank.h").exists():
        return "slurm/spank.h isn't there (Debian's package libslurm-dev)"
    return "" if shutil.which("cc", path=PATHS) else "there is no C compiler"


class Cluster:
    """`with Cluster(folder, nodes) as cluster:`; everything that it started is gone after the block."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{number}" for number in range(1, num_nodes + 1)]
        self.environment = {**os.environ, "PATH": PATHS, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self._clear()
        for name in ("log", "run", "state", "spool", "munge", "munge-run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write()
        try:
            self._start_munge()
            self._ip("link", "add", f"{_NAME}br0", "type", "bridge")
            self._ip("addr", "add", f"{_PREFIX}.1/24", "dev", f"{_NAME}br0")
            self._ip("link", "set", f"{_NAME}br0", "up")
            self._spawn("slurmctld", ["slurmctld", "-D", "-c"])
            for node in self.nodes:
                self.power_on(node)
            self.wait(self._all_up, 40, "nodes that are up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self._processes]:
            self._stop(name)
        self._clear()

    # ---- jobs

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, f"no {what} within {seconds} s\n{self._say()}"
            time.sleep(0.1)

    def finished(self, job: str, seconds: float) -> str:
        """Its state when it has ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "STOPPED", "REQUEUE_HOLD")
        self.wait(lambda: self.state(job) not in going, seconds, f"end of job {job}")
        return self.state(job)

    # ---- nodes

    def power_on(self, node: str) -> None:
        space, address = f"{_NAME}-{node}", f"{_PREFIX}.{10 + int(node[1:])}"
        if not Path(f"/run/netns/{space}").exists():
            self._ip("netns", "add", space)
            self._ip("link", "add", f"{_NAME}{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")
        self._ip("link", "set", f"{_NAME}{node}", "master", f"{_NAME}br0", "up")
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{space}", *inside, "bash", "-c", _NODE, "node", node, str(self.folder)]
        self._spawn(node, command)

    def power_off(self, node: str) -> None:
        """The cable first: a dying host sends no FIN, its peers notice by time-out."""
        self.cut(node)
        self._stop(node)

    def cut(self, node: str) -> None:
        self._ip("link", "set", f"{_NAME}{node}", "down")

    def heal(self, node: str) -> None:
        self._ip("link", "set", f"{_NAME}{node}", "up")

    def on_node(self, node: str, *command: str) -> None:
        """As root, among that node's mounts."""
        subprocess.run(["nsenter", f"--target={self._processes[node].pid}", "--mount", *command], check=True)

    def processes(self, job: str, rank: int | None = None) -> list[int]:
        """Of a job's ranks on all nodes, as this machine numbers them."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                variables = (place / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            given = dict(one.split(b"=", 1) for one in variables if b"=" in one)
            wanted = b"RANK" in given if rank is None else given.get(b"RANK") == str(rank).encode()
            if wanted and given.get(b"SLURM_JOB_ID") == job.encode():
                found.append(int(place.name))
        return found

    # ---- inside

    def _all_up(self) -> bool:
        lines = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T", check=False).split("\n")
        up = [line for line in lines if line.endswith((" idle", " mixed", " allocated", " completing"))]
        return len(up) == len(self.nodes)

    def _write(self) -> None:
        names = [
            f"NodeName={node} NodeAddr={_PREFIX}.{10 + int(node[1:])} Port={_PORT + 1} CPUs=4 RealMemory=4000 "
            "State=UNKNOWN"
            for node in self.nodes
        ]
        host = os.uname().nodename.split(".")[0]
        text = _CONF.format(host=host, prefix=_PREFIX, port=_PORT, folder=self.folder, nodes="\n".join(names),
                            first_job=int(time.time()) % 500_000 * 10 + 1)  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        if not without_containers():
            plugin = self.folder / "container.so"
            source = Path(__file__).with_name("container.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", plugin, source], check=True)
            (self.folder / "plugstack.conf").write_text(f"required {plugin}\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for systemd
        hosts = ["127.0.0.1 localhost", f"{_PREFIX}.1 {host}"]
        hosts += [f"{_PREFIX}.{10 + int(node[1:])} {node}" for node in self.nodes]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_munge(self) -> None:
        place, socket = self.folder / "munge", self.folder / "munge-run"
        (place / "munge.key").write_bytes(os.urandom(128))
        for path, mode in ((place / "munge.key", 0o600), (place, 0o700), (socket, 0o755)):
            path.chmod(mode)
            shutil.chown(path, "munge", "munge")
        self._spawn("munged", [
            "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", "--force",
            f"--key-file={place}/munge.key", f"--socket={socket}/munge.sock", f"--pid-file={socket}/munged.pid",
            f"--log-file={place}/munged.log", f"--seed-file={place}/seed",
        ])  # fmt: skip
        self.wait((socket / "munge.sock").exists, 10, "munge socket")

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _stop(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)  # of a node: takes all of its processes along
            process.wait()

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], env=self.environment, check=True, capture_output=True)

    def _clear(self) -> None:
        """What an earlier cluster left, a killed one's too."""
        links = [f"{_NAME}br0", *(f"{_NAME}n{number}" for number in range(1, 10))]
        commands = [["netns", "del", f"{_NAME}-n{number}"] for number in range(1, 10)]
        for words in [*commands, *(["link", "del", link] for link in links)]:
            subprocess.run(["ip", *words], env=self.environment, capture_output=True, check=False)

    def _say(self) -> str:
        parts = [self.run("sinfo", "-N", "-l", check=False), self.run("squeue", "-l", check=False)]
        for log in sorted((self.folder / "log").glob("*.log")):
            parts.append(f"{log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

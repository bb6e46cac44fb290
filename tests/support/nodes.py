"""A Ray of several nodes on one machine, each with a network and disks of its own.

A node is a network, a mount and a process namespace: it has its own address on a bridge, an empty
``data`` folder and /dev/shm that no other node sees, and all of its processes end at once if its
first process is killed. What nodes share is an S3 server on the head's address. The namespaces end
with their first processes, which end with this process, however it ends: nothing is left behind.
"""

import ctypes
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from covtanet.machine import num_cores
from infra.local.services import QUIET, ROOT, Service, is_healthy, start_s3, wait_for, write_private

BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HEAD = f"{NETWORK}.1"
GCS_PORT = 6379
MLFLOW_PORT = 5000
INTERFACE = "eth0"
NAMESPACES = ("--net", "--mount", "--pid")
PROGRAMS = ("ip", "nsenter", "unshare", "mount", "taskset")
# Each node would count all of the machine's memory as its own.
MEMORY_BYTES = 4 << 30
OBJECT_STORE_BYTES = 256 << 20
# The node's first process: it lives until this process closes its standard input.
FIRST_PROCESS = """
mount -t tmpfs tmpfs "$1" && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo ready
exec cat > /dev/null
"""
WAIT_UNTIL_SEEN = """
import sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} != set(sys.argv[1:]):
    time.sleep(0.5)
"""


def reason_to_skip() -> str:
    """Return why this machine cannot have such nodes; empty if it can."""
    if os.geteuid():
        return "namespaces of nodes need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"missing: {', '.join(missing)} (iproute2, util-linux)"
    command = ["unshare", *NAMESPACES, "--fork", "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "the kernel gives no namespaces"
    return ""


@dataclass
class Node:
    """A machine of its own, as far as its processes can tell."""

    address: str
    holder: subprocess.Popen[str]
    first: psutil.Process
    """Its first process."""
    ray: Service | None = None

    @property
    def inside(self) -> tuple[str, ...]:
        """The command that runs another on this node."""
        return ("nsenter", f"--target={self.first.pid}", *NAMESPACES, f"--wd={ROOT}", "--")

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """Run a command on this node and return its output."""
        done = subprocess.run(
            [*self.inside, *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return done.stdout

    def is_alive(self) -> bool:
        """Return whether Ray runs on the node."""
        return self.ray is not None and self.ray.process.poll() is None

    def kill(self) -> None:
        """End every process of the node at once, as a reset does."""
        # It checks that the process is still the one it was.
        with suppress(psutil.NoSuchProcess):
            self.first.kill()
        with self.holder:  # closes its pipes
            self.holder.wait()

    def unplug(self) -> None:
        """Take the node from the network: its packets are lost, and nobody is told."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def terminate(self) -> None:
        """Ask Ray to leave, as Kubernetes and spot instances do."""
        assert self.ray is not None
        (ray,) = psutil.Process(self.ray.process.pid).children()
        ray.terminate()


def processes(node: Node) -> str:
    """Return the command lines of a node's processes, in which Ray's name the work they do."""
    return node.run("ps", "ax", "-o", "args")


@contextmanager
def network_of(node: Node) -> Iterator[None]:
    """Let this thread, and the processes that it starts, use the network of a node."""
    ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    theirs = os.open(f"/proc/{node.first.pid}/ns/net", os.O_RDONLY)
    try:
        _enter(theirs)
        yield
    finally:
        _enter(ours)
        os.close(ours)
        os.close(theirs)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


@dataclass
class Nodes:
    """A head, its workers, and the S3 server that they share.

    folder: logs and the token. bucket: the folder of this machine that holds the buckets. data: the
    path at which every node has a folder of its own. variables: of all processes of the nodes.
    """

    folder: Path
    bucket: Path
    data: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    _services: list[Service] = field(default_factory=list)

    @property
    def head(self) -> Node:
        """The node of the head, and of jobs."""
        return self.nodes[0]

    def start_head(self, num_cpus: int, *, with_dashboard: bool) -> None:
        """Start the network, the S3 server and the head."""
        head = self._add_node(HEAD)
        head.run("ip", "link", "add", INTERFACE, "type", "bridge")
        head.run("ip", "addr", "add", f"{HEAD}/24", "dev", INTERFACE)
        head.run("ip", "link", "set", INTERFACE, "up")
        token = self.folder / "token"
        write_private(token, secrets.token_hex(32))
        with network_of(head):
            s3 = start_s3(
                self.bucket, self.folder / "s3.log", "nodes", secrets.token_hex(16), host=HEAD
            )
        self._services.append(s3)
        self.environment = {
            **os.environ, **s3.environment, **QUIET, "COVTANET_ALLOW_PLAIN_HTTP": "1",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}:{os.environ['PATH']}", **self.variables,
        }  # fmt: skip
        dashboard = str(with_dashboard).lower()
        options = ("--head", f"--port={GCS_PORT}", f"--include-dashboard={dashboard}")
        self._start_ray(head, num_cpus, *options)
        self.environment["RAY_ADDRESS"] = f"{HEAD}:{GCS_PORT}"

    def add_worker(self, num_cpus: int) -> Node:
        """Add a node to the network and to Ray."""
        number = len(self.nodes) + 1
        node = self._add_node(f"{NETWORK}.{number}")
        port = f"port{number}"
        peer = ("peer", "name", INTERFACE, "netns", str(node.first.pid))
        # Of this machine's processes, since the head's /proc does not have that of the other node.
        with network_of(self.head):
            for command in (
                ("link", "add", port, "type", "veth", *peer),
                ("link", "set", port, "master", INTERFACE, "up"),
            ):
                subprocess.run(("ip", *command), check=True)
        node.run("ip", "addr", "add", f"{node.address}/24", "dev", INTERFACE)
        node.run("ip", "link", "set", INTERFACE, "up")
        self._start_ray(node, num_cpus, f"--address={HEAD}:{GCS_PORT}")
        return node

    def wait_until_seen(self) -> None:
        """Wait until the nodes that Ray believes to live are those that do."""
        alive = {node.address for node in self.nodes if node.is_alive()}
        self.head.run(sys.executable, "-c", WAIT_UNTIL_SEEN, *alive, environment=self.environment)

    def start_tracker(self) -> None:
        """Start an MLflow server that every node reaches.

        Without authentication, which only a network of its own allows.
        """
        url = f"http://{HEAD}:{MLFLOW_PORT}"
        command = [
            str(BIN / "mlflow"), "server", "--host", HEAD, "--port", str(MLFLOW_PORT),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        log = self.folder / "mlflow.log"
        with network_of(self.head), log.open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            tracker = Service(process, {}, log)
            wait_for(tracker, lambda: is_healthy(f"{url}/health"))
        self._services.append(tracker)
        self.environment["MLFLOW_TRACKING_URI"] = url

    def close(self) -> None:
        """End all nodes and the S3 server."""
        for node in reversed(self.nodes):
            node.kill()
            if node.ray is not None:
                node.ray.stop()
        for service in self._services:
            service.stop()

    def _add_node(self, address: str) -> Node:
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / "nodes.log").open("ab") as log:
            holder = subprocess.Popen(
                [*command, "sh", "-c", FIRST_PROCESS, "sh", str(self.data)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            holder.kill()
            raise RuntimeError((self.folder / "nodes.log").read_text())
        (first,) = psutil.Process(holder.pid).children()
        node = Node(address, holder, first)
        self.nodes.append(node)
        return node

    def _start_ray(self, node: Node, num_cpus: int, *options: str) -> None:
        log = self.folder / f"ray-{node.address}.log"
        # A node with one CPU has one core: its threads would crawl beside those of the others.
        core = self.nodes.index(node) % num_cores()
        on_core = ("taskset", "--cpu-list", str(core)) if num_cpus == 1 else ()
        command = [
            *node.inside, *on_core, str(BIN / "ray"), "start", "--block",
            "--disable-usage-stats", *options,
            f"--node-ip-address={node.address}", f"--num-cpus={num_cpus}",
            f"--memory={MEMORY_BYTES}", f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={self.data / 'ray'}",
        ]  # fmt: skip
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=self.environment
            )
        node.ray = Service(process, {}, log)
        wait_for(node.ray, lambda: "Ray runtime started" in log.read_text(errors="replace"))


@contextmanager
def started_nodes(
    folder: Path,
    bucket: Path,
    head_cpus: int,
    *worker_cpus: int,
    with_dashboard: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Nodes]:
    """Start a head and workers with so many CPUs; end them, whatever happens."""
    with ExitStack() as stack:
        # Ray's sockets need a short path.
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cov")))
        nodes = Nodes(folder, bucket, data, variables or {})
        stack.callback(nodes.close)
        nodes.start_head(head_cpus, with_dashboard=with_dashboard)
        for num_cpus in worker_cpus:
            nodes.add_worker(num_cpus)
        yield nodes

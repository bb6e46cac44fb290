"""Main loop of a sandboxed child process: give up all rights, then answer requests.

``framing`` has the format of requests and answers, ``child_process`` the other side.
"""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from covtanet.decoding import seccomp
from covtanet.decoding.framing import receive_objects, send_answer
from covtanet.errors import ConfigError

PAGE_BYTES = resource.getpagesize()
NOBODY = 65534
# The parent's clock ends a request that takes too long. A limit of CPU time is the net below it,
# for a child that has lost its parent. The limit cannot be raised again, so it holds for the life
# of the child, which is replaced before it reaches the limit.
CPU_LIMIT_FACTOR, CPU_LIMIT_REQUESTS = 4, 3
# From the signal that can be handled to the one that cannot.
CPU_GRACE_S = 5

Answer = tuple[dict[str, Any], list[Any]]
Handler = Callable[[dict[str, Any], Iterator[bytes]], Answer]


def run(handlers: Mapping[str, Handler], warm_up: Callable[[], None]) -> None:
    """Answer requests from standard input until it ends.

    handlers: by kind of request; they take the request and its objects, and return the answer's
    header and the buffers after it.
    """
    limits = json.loads(sys.argv[2])
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text must not look like an answer
    warm_up()
    cpu_s = CPU_LIMIT_FACTOR * limits["timeout_s"]
    missing = apply_confinement(limits["memory_mib"] << 20, CPU_LIMIT_REQUESTS * cpu_s)
    send_answer(answers, {"missing_confinement": missing})
    started_s = _used_cpu_s()
    while line := requests.readline():
        request = json.loads(line)
        contents = receive_objects(requests)
        header, buffers = handlers[request["kind"]](request, contents)
        if not header.get("is_last"):
            # A refused series has unread bytes; the next request begins after them.
            for _ in contents:
                pass
        if _used_cpu_s() - started_s > (CPU_LIMIT_REQUESTS - 1) * cpu_s:
            header["is_last"] = True
        send_answer(answers, {"nonce": request["nonce"], **header}, *buffers)
        if header.get("is_last"):
            return


def apply_confinement(memory_bytes: int, cpu_s: float) -> list[str]:
    """Give up files, sockets, processes, signals and more memory or time than agreed, for good.

    Files that are open stay open. Returns the steps that failed, in words.
    """
    _set_limits(memory_bytes, cpu_s)
    missing = []
    for name, confine in (
        ("user", _become_nobody),  # root could raise the limits again
        ("privileges", seccomp.forbid_new_privileges),  # before the filter, which needs it
        ("system calls", seccomp.install),
    ):
        try:
            confine()
        except (OSError, ConfigError) as error:
            missing.append(f"{name}: {error}")
    return missing


def _set_limits(memory_bytes: int, cpu_s: float) -> None:
    """Limit memory, CPU time and descriptors, and forbid to write files and core dumps."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    max_bytes = used_bytes + memory_bytes
    cpu_limit_s = int(_used_cpu_s() + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit_s, cpu_limit_s + CPU_GRACE_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # 0, not the next number: a descriptor that is closed would be free to be used again.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _used_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

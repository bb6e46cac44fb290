"""Main loop of a sandboxed child process: give up all rights, then answer requests.

A request is a line of JSON and objects: each a 1, chunks behind their lengths, then a length of 0;
a 0 ends them all. An answer is a line of JSON, which repeats the request's nonce, and what follows
from it. See ``child_process``.
"""

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from covtanet.decoding import seccomp
from covtanet.errors import ConfigError

PAGE_BYTES = resource.getpagesize()
NOBODY = 65534
# The parent's clock ends a request that takes too long. A limit of CPU time is the net below it, for
# a child whose parent is gone. It cannot be raised again, so it holds for the child's life; a child
# is replaced before it.
CPU_LIMIT_FACTOR, CPU_LIMIT_REQUESTS = 4, 3
CPU_GRACE_S = 5  # between the signal and the end

Answer = tuple[dict[str, Any], list[Any]]
Work = Callable[[dict[str, Any], Iterator[bytes]], Answer]


def run(work: dict[str, Work], warm_up: Callable[[], None]) -> None:
    """Answer requests from standard input until it ends.

    work: by kind of request, what takes the request and its objects to the answer's header and the
    buffers behind it.
    """
    limits = json.loads(sys.argv[2])
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text must not look like an answer
    warm_up()
    cpu_s = CPU_LIMIT_FACTOR * limits["timeout_s"]
    _write(
        answers,
        {"open_doors": shut_the_doors(limits["memory_mib"] << 20, CPU_LIMIT_REQUESTS * cpu_s)},
    )
    started_s = _cpu_s()
    while line := requests.readline():
        request = json.loads(line)
        contents = _receive(requests)
        header, buffers = work[request["kind"]](request, contents)
        if not header.get("is_last"):
            for (
                _
            ) in contents:  # unread bytes of a refused series; the next request begins behind them
                pass
        if _cpu_s() - started_s > (CPU_LIMIT_REQUESTS - 1) * cpu_s:
            header["is_last"] = True
        _write(answers, {"nonce": request["nonce"], **header}, *buffers)
        if header.get("is_last"):
            return


def shut_the_doors(memory_bytes: int, cpu_s: float) -> list[str]:
    """Give up files, sockets, processes, signals and more memory or time than agreed, for good.

    Files that are open stay so. Returns the steps that failed, in words.
    """
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    cpu_limit_s = int(_cpu_s() + cpu_s) + 1
    for what, soft, hard in (
        (resource.RLIMIT_AS, used_bytes + memory_bytes, used_bytes + memory_bytes),
        (resource.RLIMIT_CPU, cpu_limit_s, cpu_limit_s + CPU_GRACE_S),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (
            resource.RLIMIT_NOFILE,
            0,
            0,
        ),  # not only the next number: one that is closed is free again
    ):
        resource.setrlimit(what, (soft, hard))
    still_open = []
    for name, shut in (
        ("user", _become_nobody),  # root could raise the limits again
        ("privileges", seccomp.forbid_new_privileges),  # before the filter, which needs it
        ("system calls", seccomp.install),
    ):
        try:
            shut()
        except (OSError, ConfigError) as error:
            still_open.append(f"{name}: {error}")
    return still_open


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _write(answers: IO[bytes], header: dict[str, Any], *buffers: Any) -> None:
    answers.write(json.dumps(header).encode() + b"\n")
    for buffer in buffers:
        answers.write(buffer)
    answers.flush()


def _receive(requests: IO[bytes]) -> Iterator[bytes]:
    while requests.read(1) == b"\x01":
        yield _receive_object(requests)  # not kept here while it is decoded: it may be 1 GiB


def _receive_object(requests: IO[bytes]) -> bytes:
    chunks = []
    while length := int.from_bytes(requests.read(4), "little"):
        chunks.append(requests.read(length))
    return b"".join(chunks)

"""Confinement: payloads run inside the sandbox's child, as if an input had taken it over."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from repository import ROOT

from covtanet.decoding import child_process, process, seccomp
from covtanet.decoding.child_process import DECODER, HEADER_READER, Child
from covtanet.decoding.process import Limits
from covtanet.errors import ConfigError, WeakSandboxError
from covtanet.ledger.run import Run
from covtanet.screening import plan
from covtanet.screening.config import ScreeningConfig

# The start of the child up to its first request, by its own functions, and then the payload.
TAKEN_OVER = """
import sys; sys.path.insert(0, sys.argv[1])
import ctypes, json, mmap, os, resource, signal, socket, threading
from covtanet.decoding import confinement, {program}
{program}.warm_up()
libc, parent = ctypes.CDLL(None, use_errno=True), os.getppid()
{before}
missing_confinement = confinement.apply_confinement(256 << 20, 60)
assert missing_confinement == [], missing_confinement
os.write(1, b"shut ")
try:
    exec(sys.argv[2])
    os.write(1, b"open")
except (OSError, ValueError):  # the second of setrlimit
    os.write(1, b"refused")
"""
# The user nobody may not be allowed to start root's interpreter, so the user changes inside.
BECOME_NOBODY = "confinement._become_nobody()"
NO_FILTER = "import platform; platform.machine = lambda: 'vax'; " + process.CODE
REFUSED, DIES = (0, "shut refused"), (-signal.SIGSYS, "shut ")
PAYLOADS = {
    "a file, after a number is free": ("os.close(2); open('/etc/hostname')", REFUSED),
    "the parent's environment": ("os.close(2); open(f'/proc/{parent}/environ')", REFUSED),
    "a new session": ("os.setsid()", REFUSED),
    "more CPU time": ("resource.setrlimit(resource.RLIMIT_CPU, (1 << 30, 1 << 30))", REFUSED),
    "more files": ("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", REFUSED),
    "new code": (
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        REFUSED,
    ),
    "a socket": ("os.close(2); socket.socket()", DIES),
    "a process": ("os.fork()", DIES),
    "a program": ("os.execv('/bin/true', ['true'])", DIES),
    "the parent traced": ("libc.ptrace(16, parent, 0, 0)", DIES),
    "the parent's memory": ("libc.process_vm_readv(parent, 0, 0, 0, 0, 0)", DIES),
    "the parent ended": ("os.kill(parent, signal.SIGKILL)", DIES),
    "another user": ("os.setresuid(0, 0, 0)", DIES),
}


def take_over(payload: str, program: str = HEADER_READER, before: str = "") -> tuple[int, str]:
    """Exit code and output of a child that runs a payload inside the sandbox."""
    code = TAKEN_OVER.replace("{program}", program).replace("{before}", before)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, ROOT, payload],
        input="",
        capture_output=True,
        env=process.ENVIRONMENT,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("shut "), done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("before", ["", BECOME_NOBODY], ids=["", "nobody"])
def test_hostile_code_in_the_child_can_only_compute(name: str, before: str) -> None:
    payload, expected = PAYLOADS[name]
    assert take_over(payload, before=before) == expected


@pytest.mark.parametrize("name", ["a file, after a number is free", "a socket", "a process"])
def test_hostile_code_in_the_decoder_is_confined_as_in_the_header_reader(name: str) -> None:
    payload, expected = PAYLOADS[name]
    assert take_over(payload, DECODER) == expected


def test_confined_child_may_start_threads_and_use_memory() -> None:
    payload = "t = threading.Thread(target=bytearray, args=(64 << 20,)); t.start(); t.join()"
    assert take_over(payload) == (0, "shut open")


def test_child_that_ignores_sigxcpu_is_killed_at_the_cpu_limit() -> None:
    before = "confinement.CPU_GRACE_S = 1; shut = confinement.apply_confinement\n"
    before += "confinement.apply_confinement = lambda memory_bytes, cpu_s: shut(memory_bytes, 0)"
    payload = "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert take_over(payload, before=before) == (-signal.SIGKILL, "shut ")


PARENT = """
import ctypes, json, os, sys; sys.path.insert(0, sys.argv[1])
from covtanet.decoding import confinement, seccomp
from covtanet.decoding.child_process import HEADER_READER, Child
from covtanet.decoding.process import Limits

libc, results = ctypes.CDLL(None), {}

def read_as_sibling():
    receiving, sending = os.pipe()
    if os.fork() == 0:  # not confined
        try:
            os.write(sending, open(f"/proc/{os.getppid()}/environ", "rb").read())
        except PermissionError:
            os.write(sending, b"refused")
        os._exit(0)
    os.wait()
    return os.read(receiving, 65536).decode()

results["dumpable before"] = libc.prctl(3, 0, 0, 0, 0)
child = Child(HEADER_READER, Limits(memory_mib=256, timeout_s=60))
child.warm()
results["dumpable after"] = libc.prctl(3, 0, 0, 0, 0)
child.kill()
confinement._become_nobody()
libc.prctl(4, 1, 0, 0, 0)  # as a process that nobody started
results["before"] = read_as_sibling()
seccomp.hide_memory()
results["after"] = read_as_sibling()
print(json.dumps(results))
"""


def test_process_of_the_same_user_cannot_read_the_parents_environment() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", PARENT, ROOT],
        env={"AWS_SECRET_ACCESS_KEY": "CANARY"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd="/",
    )
    results = json.loads(done.stdout)
    assert (results["dumpable before"], results["dumpable after"]) == (1, 0)
    assert "CANARY" in results["before"]
    assert results["after"] == "refused"


def test_decoding_is_refused_if_the_kernel_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CODE", NO_FILTER)
    limits = Limits(memory_mib=256, timeout_s=3, allow_weak=False)
    with pytest.raises(
        WeakSandboxError, match="no filter of system calls for vax, expected x86_64"
    ):
        Child(HEADER_READER, limits).warm()
    weak = Child(HEADER_READER, replace(limits, allow_weak=True))
    assert weak.warm().poll() is None
    weak.kill()


def test_job_refuses_to_start_if_the_kernel_has_no_filter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before it lists anything: no row fails for it."""
    monkeypatch.setattr(process, "CODE", NO_FILTER)
    child_process.refuse_weak_sandbox.cache_clear()
    run = Run(
        archive=str(tmp_path / "nowhere"),
        ledger=str(tmp_path / "ledger"),
        run_date=date(2026, 11, 26),
        model_name="m",
        model_version="1",
        model_digest="d",
        config_digest="c",
        software_version="0",
    )
    with pytest.raises(ConfigError, match="allow_weak_sandbox = true under"):
        plan.make_manifest(run, ScreeningConfig())
    assert not (tmp_path / "ledger").exists()


def test_allowed_weak_sandbox_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "CODE", NO_FILTER)
    child_process.refuse_weak_sandbox.cache_clear()
    for _ in range(2):
        child_process.refuse_weak_sandbox(Limits(memory_mib=256, timeout_s=3, allow_weak=True))
    assert caplog.text.count("allow_weak_sandbox = true") == 1


def test_seccomp_filter_names_each_call_once() -> None:
    for column in (0, 1):
        tables = [*seccomp.ALLOWED.values(), *seccomp.UNKNOWN.values(), *seccomp.ENDS.values()]
        tables += [
            condition[0]
            for condition in (*seccomp.ALLOWED_IF.values(), *seccomp.ENDS_UNLESS.values())
        ]
        numbers = [numbers[column] for numbers in tables if numbers[column] >= 0]
        assert len(set(numbers)) == len(numbers)

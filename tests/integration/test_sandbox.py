"""The decoder's child process: the same answers, nothing to steal, nothing to open, and an end to everything."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from encoded_ct import ENCODERS, encoded
from hostile import CONTROLS, gz, plain_nifti, slices
from pydicom.uid import RLELossless

from covtanet.ct.window import WindowConfig
from covtanet.decoding import child_process as module
from covtanet.decoding import prepare as decode
from covtanet.decoding.sandbox import Limits, Sandbox
from covtanet.errors import SandboxClosedError, StudyError, StudyTimeoutError

WINDOW = WindowConfig(size_px=64)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "CANARY")
    found = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    yield found
    found.close()


def child(sandbox: Sandbox) -> psutil.Process:
    """The warm child."""
    return psutil.Process(sandbox.child.warm().pid)


def test_answers_are_those_of_this_process_and_the_child_stays_warm(sandbox: Sandbox) -> None:
    pids = set()
    for source_format, objects in (
        ("dicom", list(slices())),
        ("nifti", [gz(plain_nifti())]),
        ("dicom", list(slices())),
    ):
        found = sandbox(source_format, [[data[:1000], data[1000:]] for data in objects])
        expected = decode.prepare(source_format, objects, WINDOW, 2.5)
        np.testing.assert_array_equal(found.slices, expected.slices)
        np.testing.assert_array_equal(found.chosen, expected.chosen)
        assert (found.masks, found.qc_flags, found.num_slices) == (expected.masks, (), 12)
        assert found.spacing_mm == expected.spacing_mm
        pids.add(child(sandbox).pid)
    assert len(pids) == 1


def test_a_refusal_half_way_leaves_the_child_fit_for_the_next(sandbox: Sandbox) -> None:
    broken = [slices()[0], b"no DICOM", *slices()[2:]]
    pid = child(sandbox).pid
    with pytest.raises(StudyError, match="no DICOM header"):
        sandbox("dicom", [[data] for data in broken])
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12
    assert child(sandbox).pid == pid


def test_a_child_that_reads_no_further_is_ended_however_much_is_still_to_send(
    sandbox: Sandbox,
) -> None:
    """It stops in the middle of a series that fits no pipe: nobody waits for it but for the time that a series has."""
    process, timeout_s = child(sandbox), sandbox.limits.timeout_s

    def chunks() -> Iterator[bytes]:
        yield bytes(1 << 20)
        process.send_signal(signal.SIGSTOP)
        for _ in range(16):
            yield bytes(1 << 20)

    with pytest.raises(StudyTimeoutError, match=f"longer than {timeout_s:g} s"):
        sandbox("dicom", [chunks()])
    assert not process.is_running()
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12


def test_a_child_that_dies_at_its_start_is_started_once_more(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def child_code() -> str:
        tried.append(1)
        return "import sys; sys.exit(3)" if len(tried) == 1 else module.CODE.format(module.DECODER)

    started = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **how: started([*command[:3], child_code(), *command[4:]], **how),
    )
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12
    assert len(tried) == 2


def test_the_child_has_no_secret_and_can_open_write_and_grow_no_more(sandbox: Sandbox) -> None:
    process = child(sandbox)
    assert "CANARY" not in str(process.environ())
    assert {"LANG", "OMP_NUM_THREADS"} <= set(process.environ()) <= {
        "LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX",
        "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    }  # fmt: skip
    limits = {
        line[:25].strip(): line[26:46].strip()
        for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    }
    assert (
        limits["Max open files"] == "0"
    )  # none, not one more than there are: one that is closed is free again
    assert (limits["Max file size"], limits["Max core file size"]) == ("0", "0")
    assert int(limits["Max address space"]) < process.memory_info().vms + (513 << 20)


def test_what_needs_more_memory_than_allowed_is_too_large() -> None:
    """A header that keeps its word: 1024 x 1024 x 400 voxels of zeros, less than a megabyte as gzip."""
    sandbox = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=60))
    header = bytearray(plain_nifti()[:352])
    header[40:48] = np.array([3, 1024, 1024, 400], "<i2").tobytes()
    bomb = gz(bytes(header)) + gz(bytes(1 << 20)) * 800
    # On a busy machine this takes longer than the tests of hanging children wait.
    sandbox.child.limits = replace(sandbox.limits, timeout_s=60)
    with pytest.raises(StudyError, match="more memory than decode_memory_mib allows") as error:
        sandbox("nifti", [[bomb]])
    assert error.value.reason == "too_large"
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12
    sandbox.close()


@pytest.mark.parametrize(
    ("sent", "expected", "message"),
    [
        (signal.SIGKILL, StudyError, "died of this input, signal 9"),
        (signal.SIGSTOP, StudyTimeoutError, "longer than 3 s"),
    ],
)  # fmt: skip
def test_a_child_that_dies_or_hangs_is_an_answer(
    sandbox: Sandbox, sent: signal.Signals, expected: type[Exception], message: str
) -> None:
    """The signal comes when the input is half in."""

    def objects() -> Iterator[list[bytes]]:
        for index, data in enumerate(slices()):
            if index == 6:
                child_process.send_signal(sent)
            yield [data]

    child_process = child(sandbox)
    with pytest.raises(expected, match=message):
        sandbox("dicom", objects())
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12


def test_no_child_is_left_behind() -> None:
    found = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    process = child(found)
    before = threading.active_count()
    found.close()
    assert not process.is_running()
    assert threading.active_count() <= before


@pytest.fixture(scope="module")
def warm() -> Iterator[Sandbox]:
    found = Sandbox(WINDOW, 2.5, Limits(memory_mib=1024, timeout_s=20))
    yield found
    found.close()


@pytest.mark.parametrize("name", CONTROLS)
def test_odd_but_sound_input_is_decoded_behind_the_doors(name: str, warm: Sandbox) -> None:
    check_decoded(warm, name[:5].rstrip(), list(CONTROLS[name]().values()))


@pytest.mark.parametrize("syntax", [*ENCODERS, RLELossless])
def test_every_syntax_is_decoded_behind_the_doors(syntax: str, warm: Sandbox) -> None:
    check_decoded(warm, "dicom", encoded(slices(), syntax))


def check_decoded(sandbox: Sandbox, source_format: str, objects: list[bytes]) -> None:
    found = sandbox(source_format, [[data] for data in objects])
    expected = decode.prepare(source_format, objects, WINDOW, 2.5)
    np.testing.assert_array_equal(found.slices, expected.slices)
    assert (found.masks, found.qc_flags) == (expected.masks, expected.qc_flags)


def half_way(act: Callable[[], object]) -> Iterator[list[bytes]]:
    """The sound series; something happens when it is half in."""
    for index, data in enumerate(slices()):
        if index == 6:
            act()
        yield [data]


def test_second_thread_is_refused_and_the_first_gets_its_own_answer(sandbox: Sandbox) -> None:
    """Two threads that write into one child read each other's answers: a patient's for another."""
    refused = []

    def enter() -> None:
        with ThreadPoolExecutor(1) as other:
            error = other.submit(sandbox, "nifti", [[gz(plain_nifti())]]).exception(timeout=20)
            refused.append(error)

    found = sandbox("dicom", half_way(enter))
    np.testing.assert_array_equal(
        found.slices, decode.prepare("dicom", slices(), WINDOW, 2.5).slices
    )
    assert isinstance(refused[0], RuntimeError)
    assert "two threads use one sandbox" in str(refused[0])


def test_closed_sandbox_ends_the_series_that_is_being_sent_and_takes_no_other(
    sandbox: Sandbox,
) -> None:
    process = child(sandbox)

    def kill() -> None:
        with ThreadPoolExecutor(1) as other:
            other.submit(sandbox.close).result(timeout=20)

    with pytest.raises(SandboxClosedError, match="closed"):
        sandbox("dicom", half_way(kill))
    assert not process.is_running()
    with pytest.raises(RuntimeError, match="the sandbox is closed"):
        sandbox("dicom", [[data] for data in slices()])
    sandbox.close()


def test_closed_sandbox_ends_a_thread_that_waits_for_the_answer() -> None:
    """The child is stopped with all of a series in its pipe, so that nothing but the kill can end the wait."""
    found = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=600))
    process = child(found)
    waiting = threading.Event()

    def objects() -> Iterator[list[bytes]]:
        process.send_signal(signal.SIGSTOP)
        yield [slices()[0]]
        waiting.set()

    with ThreadPoolExecutor(1) as other:
        answer = other.submit(found, "dicom", objects())
        assert waiting.wait(60)
        found.close()
        assert isinstance(answer.exception(timeout=60), SandboxClosedError)
    assert not process.is_running()


def test_close_while_the_child_starts_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    started, killers, processes = module._started, [], []

    def start_and_kill(*arguments: object) -> "subprocess.Popen[bytes]":
        process = started(*arguments)  # type: ignore[arg-type]
        processes.append(process)
        killers.append(threading.Thread(target=found.close))
        killers[-1].start()
        return process

    monkeypatch.setattr(module, "_started", start_and_kill)
    with pytest.raises(SandboxClosedError, match="closed"):
        found("dicom", [[data] for data in slices()])
    killers[0].join()
    assert len(processes) == 1
    assert processes[0].returncode == -signal.SIGKILL

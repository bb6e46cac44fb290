"""The decoder's child process: equal results, no secrets, no open files, and an end in time."""

import gzip
import io
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import psutil
import pytest
from encoded_ct import ENCODERS, encoded
from hostile import CONTROLS
from pydicom.uid import RLELossless
from sound_input import gz, plain_nifti, slices

from covtanet.ct.window import WindowConfig
from covtanet.decoding import child_process as module
from covtanet.decoding import prepare as decode
from covtanet.decoding import process as process_module
from covtanet.decoding.process import Limits
from covtanet.decoding.sandbox import Sandbox
from covtanet.errors import SandboxClosedError, StudyError, StudyTimeoutError
from covtanet.phantoms.warm_up import warm_up_files

WINDOW = WindowConfig(size_px=64)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "CANARY")
    decoder = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    yield decoder
    decoder.close()


def child(sandbox: Sandbox) -> psutil.Process:
    """The warm child."""
    return psutil.Process(sandbox.child.warm().pid)


def test_sandbox_equals_this_process_and_the_child_stays_warm(sandbox: Sandbox) -> None:
    pids = set()
    for source_format, objects in (
        ("dicom", list(slices())),
        ("nifti", [gz(plain_nifti())]),
        ("dicom", list(slices())),
    ):
        prepared = sandbox(source_format, [[data[:1000], data[1000:]] for data in objects])
        expected = decode.prepare(source_format, objects, WINDOW, 2.5)
        np.testing.assert_array_equal(prepared.slices, expected.slices)
        np.testing.assert_array_equal(prepared.chosen, expected.chosen)
        assert (prepared.masks, prepared.qc_flags, prepared.num_slices) == (expected.masks, (), 12)
        assert prepared.spacing_mm == expected.spacing_mm
        pids.add(child(sandbox).pid)
    assert len(pids) == 1


def test_refusal_before_the_last_object_leaves_the_child_usable(sandbox: Sandbox) -> None:
    broken = [slices()[0], b"no DICOM", *slices()[2:]]
    pid = child(sandbox).pid
    with pytest.raises(StudyError, match="no DICOM header"):
        sandbox("dicom", [[data] for data in broken])
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12
    assert child(sandbox).pid == pid


def test_child_that_stops_reading_times_out(
    sandbox: Sandbox,
) -> None:
    """It stops in the middle of a series larger than the pipe; the parent waits only timeout_s."""
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


def test_child_that_dies_at_its_start_is_started_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def child_code() -> str:
        tried.append(1)
        return (
            "import sys; sys.exit(3)"
            if len(tried) == 1
            else process_module.CODE.format(module.DECODER)
        )

    started = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **how: started([*command[:3], child_code(), *command[4:]], **how),
    )
    assert sandbox("dicom", [[data] for data in slices()]).num_slices == 12
    assert len(tried) == 2


def test_child_has_no_secret_and_cannot_open_write_or_grow(sandbox: Sandbox) -> None:
    process = child(sandbox)
    assert "CANARY" not in str(process.environ())
    assert (
        {"LANG", "OMP_NUM_THREADS"}
        <= set(process.environ())
        <= {
            "LANG",
            "LC_CTYPE",
            "OMP_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "LD_LIBRARY_PATH",
            "MALLOC_ARENA_MAX",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TRIM_THRESHOLD_",
        }
    )
    limits = {
        line[:25].strip(): line[26:46].strip()
        for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    }
    assert (
        limits["Max open files"] == "0"
    )  # 0, not the next number: a closed descriptor would be free again
    assert (limits["Max file size"], limits["Max core file size"]) == ("0", "0")
    assert int(limits["Max address space"]) < process.memory_info().vms + (513 << 20)


def test_series_that_needs_more_memory_than_allowed_is_too_large() -> None:
    """A truthful header: 1024 x 1024 x 400 voxels of zeros, less than a megabyte as gzip."""
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
)
def test_child_that_dies_is_decode_crash_and_that_hangs_is_timeout(
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
    decoder = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    process = child(decoder)
    before = threading.active_count()
    decoder.close()
    assert not process.is_running()
    assert threading.active_count() <= before


@pytest.fixture(scope="module")
def warm() -> Iterator[Sandbox]:
    decoder = Sandbox(WINDOW, 2.5, Limits(memory_mib=1024, timeout_s=20))
    yield decoder
    decoder.close()


@pytest.mark.parametrize("name", CONTROLS)
def test_odd_but_sound_input_is_decoded_in_the_sandbox(name: str, warm: Sandbox) -> None:
    check_decoded(warm, name[:5].rstrip(), list(CONTROLS[name]().values()))


@pytest.mark.parametrize("syntax", [*ENCODERS, RLELossless])
def test_every_syntax_is_decoded_in_the_sandbox(syntax: str, warm: Sandbox) -> None:
    check_decoded(warm, "dicom", encoded(slices(), syntax))


def check_decoded(sandbox: Sandbox, source_format: str, objects: list[bytes]) -> None:
    prepared = sandbox(source_format, [[data] for data in objects])
    expected = decode.prepare(source_format, objects, WINDOW, 2.5)
    np.testing.assert_array_equal(prepared.slices, expected.slices)
    assert (prepared.masks, prepared.qc_flags) == (expected.masks, expected.qc_flags)


def half_way(act: Callable[[], object]) -> Iterator[list[bytes]]:
    """The sound series; something happens when it is half in."""
    for index, data in enumerate(slices()):
        if index == 6:
            act()
        yield [data]


def test_second_thread_is_refused_and_the_first_gets_its_answer(sandbox: Sandbox) -> None:
    """Two threads that write into one child read each other's answers: a patient's for another."""
    refused = []

    def enter() -> None:
        with ThreadPoolExecutor(1) as other:
            error = other.submit(sandbox, "nifti", [[gz(plain_nifti())]]).exception(timeout=20)
            refused.append(error)

    prepared = sandbox("dicom", half_way(enter))
    np.testing.assert_array_equal(
        prepared.slices, decode.prepare("dicom", slices(), WINDOW, 2.5).slices
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
    """The child is stopped with all of a series in its pipe: only the kill ends the wait."""
    decoder = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=600))
    process = child(decoder)
    waiting = threading.Event()

    def objects() -> Iterator[list[bytes]]:
        process.send_signal(signal.SIGSTOP)
        yield [slices()[0]]
        waiting.set()

    with ThreadPoolExecutor(1) as other:
        answer = other.submit(decoder, "dicom", objects())
        assert waiting.wait(60)
        decoder.close()
        assert isinstance(answer.exception(timeout=60), SandboxClosedError)
    assert not process.is_running()


def test_close_while_the_child_starts_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Sandbox(WINDOW, 2.5, Limits(memory_mib=512, timeout_s=3))
    started, killers, processes = process_module.start_process, [], []

    def start_and_kill(*arguments: object) -> "subprocess.Popen[bytes]":
        process = started(*arguments)  # type: ignore[arg-type]
        processes.append(process)
        killers.append(threading.Thread(target=decoder.close))
        killers[-1].start()
        return process

    monkeypatch.setattr(module, "start_process", start_and_kill)
    with pytest.raises(SandboxClosedError, match="closed"):
        decoder("dicom", [[data] for data in slices()])
    killers[0].join()
    assert len(processes) == 1
    assert processes[0].returncode == -signal.SIGKILL


def test_warm_up_data_is_that_of_the_phantoms() -> None:
    data = resources.files("covtanet.decoding").joinpath("warm_up.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stored = {name: archive.read(name) for name in archive.namelist()}
    expected = warm_up_files()
    for files in (stored, expected):
        files["chest.nii.gz"] = gzip.decompress(files["chest.nii.gz"])
    assert stored == expected

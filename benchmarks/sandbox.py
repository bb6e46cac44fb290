"""Decoding in the sandbox against decoding in the worker, and the memory of hostile input.

Run as a program, ``python -m benchmarks.sandbox``, it prints the ratios as JSON.
"""

import gzip
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from io import BytesIO

import psutil
import pydicom

from benchmarks.decode import REAL_SERIES
from benchmarks.measure import ROOT, Result, side_by_side
from covtanet.ct import dicom_headers, nifti
from covtanet.ct.window import WindowConfig
from covtanet.decoding import prepare
from covtanet.decoding.sandbox import Sandbox
from covtanet.errors import CovtanetError
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import PhantomConfig, make_phantom
from covtanet.runtime import RETURN_MEMORY
from covtanet.screening.config import ScreeningConfig

LARGE = PhantomConfig(
    seed=5, involvement=0.3, size_px=512, num_slices=300, pixel_mm=0.7, slice_mm=0.9
)
SMALL = PhantomConfig(seed=9, size_px=64, num_slices=12, pixel_mm=5.6, slice_mm=18)
WINDOW = WindowConfig(size_px=512)
CONFIG = ScreeningConfig()
ROUNDS = 9
# Format and chunks of a series.
Series = tuple[str, Iterable[list[bytes]]]


def measure() -> list[Result]:
    """(s) ratios of time, and memory beyond that of a sound series."""
    results = []
    for name, ratio in _ratios().items():
        results.append(
            Result("s", f"safe decode over unsafe, {name}", f"{ratio:.2f} x", "<= 1.05 x")
        )
    sound = max(peak_of_child(*series) for series in _sound_input())
    text = f"{sound / 2**20:.0f} MiB"
    results.append(Result("s", "memory of a sound series of 512 x 512 x 300", text))
    for name, series in hostile_input().items():
        more = max(0, peak_of_child(*series) - sound)
        text = f"{more / 2**20:.0f} MiB"
        results.append(Result("s", f"more memory for {name}", text, "<= 1536 MiB"))
    return results


def _ratios() -> dict[str, float]:
    """Measure in a process that treats its memory as a worker of the job does."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sandbox"],
        env={**os.environ, **RETURN_MEMORY},
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    ratios: dict[str, float] = json.loads(done.stdout)
    return ratios


def main() -> int:
    """Print seconds in the sandbox over seconds in this process, for each series."""
    sandbox = Sandbox(WINDOW, CONFIG.slice_step_mm, CONFIG.decode_limits)
    ratios = {}
    for name, (source_format, objects) in _timed_series().items():
        chunks = [[data] for data in objects]
        spent = side_by_side(
            {
                "sandbox": partial(sandbox, source_format, chunks),
                "worker": partial(
                    prepare.prepare, source_format, objects, WINDOW, CONFIG.slice_step_mm
                ),
            },
            rounds=ROUNDS,
        )
        ratios[name] = spent["sandbox"] / spent["worker"]
    sandbox.close()
    print(json.dumps(ratios))
    return 0


def _timed_series() -> dict[str, tuple[str, list[bytes]]]:
    """Format and objects of each series."""
    phantom = make_phantom(LARGE)
    series = {
        "DICOM, uncompressed": ("dicom", list(dicom_objects(phantom, 1))),
        "NIfTI, gzipped": ("nifti", [nifti.write(phantom.hu, nifti_grid(phantom))]),
    }
    if REAL_SERIES.exists():
        objects = [path.read_bytes() for path in sorted(REAL_SERIES.iterdir())]
        series["DICOM, a real series"] = ("dicom", objects)
    return series


def _sound_input() -> list[Series]:
    phantom = make_phantom(LARGE)
    chunks = [[data] for data in dicom_objects(phantom, 1)]
    return [
        ("dicom", chunks),
        ("nifti", [[nifti.write(phantom.hu, nifti_grid(phantom))]]),
    ]


def hostile_input() -> dict[str, Series]:
    """Return input that asks for as much memory as the limits allow, or more."""
    phantom = make_phantom(SMALL)
    plain = gzip.decompress(nifti.write(phantom.hu, nifti_grid(phantom)))
    header = bytearray(plain[:352])
    struct.pack_into("<4h", header, 40, 3, 1024, 1024, 500)
    struct.pack_into("<2h", header, 70, 64, 64)  # float64
    zeros = gzip.compress(bytes(1 << 30), 9) * 4
    first, *_ = dicom_objects(phantom, 9)
    return {
        "a gzip bomb of 4 GiB": ("nifti", [[gzip.compress(plain) + zeros]]),
        "a header of 4 GiB that keeps its word": (
            "nifti",
            [[gzip.compress(bytes(header)) + zeros]],
        ),
        "a deflated DICOM of 1 GiB": ("dicom", [[deflated(first, 1 << 30)]]),
        "a series of 30,000 slices": ("dicom", ([first] for _ in range(30_000))),
    }


def deflated(data: bytes, num_bytes: int) -> bytes:
    """Return an object in the deflated transfer syntax, followed by zeros."""
    dataset = pydicom.dcmread(BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    start = dicom_headers.transfer_syntax(buffer.getvalue())[1]
    plain = zlib.decompress(buffer.getvalue()[start:], -zlib.MAX_WBITS)
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = stream.compress(plain + bytes(num_bytes))
    return buffer.getvalue()[:start] + packed + stream.flush()


def peak_of_child(source_format: str, chunks: Iterable[list[bytes]]) -> int:
    """Return the most bytes that a fresh decoder's child takes for a series, beyond its start."""
    sandbox = Sandbox(WINDOW, CONFIG.slice_step_mm, CONFIG.decode_limits)
    child = psutil.Process(sandbox.child.warm().pid)
    before = child.memory_info().rss
    samples = [before]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            with suppress(psutil.Error):
                samples.append(child.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with suppress(CovtanetError):
        sandbox(source_format, chunks)
    is_over.set()
    watcher.join()
    sandbox.close()
    return int(max(samples) - before)


if __name__ == "__main__":
    sys.exit(main())

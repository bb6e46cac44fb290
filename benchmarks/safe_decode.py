"""Decoding in the sandbox against decoding in the worker itself, side by side.

Run as a program it prints the ratios as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]

from cluster import RETURN_MEMORY  # noqa: E402

from covtanet.ct import nifti  # noqa: E402
from covtanet.ct.window import WindowConfig  # noqa: E402
from covtanet.decoding import prepare as decode  # noqa: E402
from covtanet.decoding.sandbox import Sandbox  # noqa: E402
from covtanet.phantoms.encodings import dicom_objects, nifti_grid  # noqa: E402
from covtanet.phantoms.phantom import PhantomConfig, make_phantom  # noqa: E402
from covtanet.screening.config import ScreeningConfig  # noqa: E402

LARGE = PhantomConfig(
    seed=5, involvement=0.3, size_px=512, num_slices=300, pixel_mm=0.7, slice_mm=0.9
)
REAL_SERIES = ROOT.parent / "shared" / "data" / "dicom" / "ricord-1a-001012"
ROUNDS = 9


def measure() -> dict[str, float]:
    """Ratio for each kind of series, in a process that treats its memory as a worker of the job does."""
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, env={**os.environ, **RETURN_MEMORY}, check=True, stdout=subprocess.PIPE, text=True
    )
    ratios: dict[str, float] = json.loads(done.stdout)
    return ratios


def main() -> int:
    window, config = WindowConfig(size_px=512), ScreeningConfig()
    sandbox = Sandbox(window, config.slice_step_mm, config.decode_limits)
    ratios = {}
    for name, source_format, contents in series():
        works: tuple[Callable[[], object], ...] = (
            lambda kind=source_format, each=contents: sandbox(kind, [[data] for data in each]),
            lambda kind=source_format, each=contents: decode.prepare(
                kind, each, window, config.slice_step_mm
            ),
        )
        safe_s, plain_s = medians(works)
        ratios[name] = safe_s / plain_s
    sandbox.close()
    print(json.dumps(ratios))
    return 0


def series() -> list[tuple[str, str, list[bytes]]]:
    """Name, format and objects of each series."""
    phantom = make_phantom(LARGE)
    found = [
        ("DICOM, uncompressed", "dicom", dicom_objects(phantom, 1)),
        ("NIfTI, gzipped", "nifti", [nifti.write(phantom.hu, nifti_grid(phantom))]),
    ]
    if REAL_SERIES.exists():
        found.append(
            (
                "DICOM, a real series",
                "dicom",
                [path.read_bytes() for path in sorted(REAL_SERIES.iterdir())],
            )
        )
    return found


def medians(works: tuple[Callable[[], object], ...]) -> list[float]:
    """Median seconds of each; they take turns, after one turn that does not count."""
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS + 1):
        for kept, work in zip(spent, works, strict=True):
            started = time.perf_counter()
            work()
            kept.append(time.perf_counter() - started)
    return [statistics.median(each[1:]) for each in spent]


if __name__ == "__main__":
    sys.exit(main())

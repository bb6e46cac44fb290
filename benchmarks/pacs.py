"""The screening job over a PACS against the same series in a folder."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import ROOT, WORK, Result, say
from benchmarks.screening_runs import JobRun, run_job
from covtanet.ct.dicom_headers import instance_uid
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.pacs.check import differing_series
from infra.pacs.orthanc import INSTALL, Orthanc, is_installed, start_orthanc

NUM_SERIES, SIZE_PX, NUM_SLICES = 200, 256, 40
SEED = 13
MODEL = ROOT / "models" / "v8-lung-box"


def measure() -> list[Result]:
    """(d) the same series by DICOMweb from Orthanc on this machine, and from a folder.

    Raises:
        SystemExit: Orthanc is not installed, or the ledgers differ.
    """
    if not is_installed():
        raise SystemExit(f"Orthanc is not installed: {INSTALL}")
    folder = _folder()
    say("from the folder")
    from_folder = run_job(str(folder), model=MODEL)
    with _filled_orthanc(folder) as orthanc:
        say("from the PACS")
        from_pacs = run_job(orthanc.archive, model=MODEL)
    differing = differing_series(from_pacs.ledger.to_pylist(), from_folder.ledger.to_pylist())
    if differing or from_pacs.ledger.num_rows != NUM_SERIES:
        raise SystemExit(f"{len(differing)} series differ")
    text = f"{NUM_SERIES} series of {NUM_SLICES} slices of {SIZE_PX} x {SIZE_PX}"
    ratio = _total_s(from_pacs) / _total_s(from_folder)
    since_first = from_pacs.spent_s / from_folder.spent_s
    return [
        Result("d", f"PACS over folder, {text}, command to commit", f"{ratio:.2f} x", "<= 1.3 x"),
        Result("d", "PACS over folder, first series to commit", f"{since_first:.2f} x"),
        Result("d", "series per minute from the PACS", f"{_rate(from_pacs):.0f}"),
        Result("d", "series per minute from the folder", f"{_rate(from_folder):.0f}"),
        Result("d", "seconds to the first series, PACS", f"{from_pacs.start_s:.1f}"),
        Result("d", "seconds to the first series, folder", f"{from_folder.start_s:.1f}"),
    ]


def _total_s(run: JobRun) -> float:
    return run.ended - run.launched


def _rate(run: JobRun) -> float:
    return 60 * NUM_SERIES / _total_s(run)


def _folder() -> Path:
    """Return the folder of the series, made at the first call."""
    folder = WORK / f"pacs-{NUM_SERIES}-{SIZE_PX}-{NUM_SLICES}"
    if not (folder / "done").exists():
        say(f"making {NUM_SERIES} phantoms")
        for number, config in enumerate(configs(NUM_SERIES, SEED, SIZE_PX, NUM_SLICES)):
            target = folder / "series" / f"{number:03d}"
            target.mkdir(parents=True, exist_ok=True)
            for content in dicom_objects(make_phantom(config), number):
                # As the PACS names them, so that the digests of both are comparable.
                (target / instance_uid(content)).write_bytes(content)
        (folder / "done").touch()
    return folder / "series"


@contextmanager
def _filled_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Start an Orthanc with the series of a folder; the environment has its password."""
    shutil.rmtree(WORK / "orthanc", ignore_errors=True)
    orthanc = start_orthanc(WORK / "orthanc", secrets.token_urlsafe(24))
    try:
        say("loading Orthanc")
        for series in sorted(folder.iterdir()):
            orthanc.load(path.read_bytes() for path in series.iterdir())
        os.environ.update(orthanc.service.environment)
        yield orthanc
    finally:
        orthanc.service.stop()
        shutil.rmtree(WORK / "orthanc", ignore_errors=True)

"""Search for bytes that a reader neither reads nor refuses, guided by coverage: ``make fuzz``.

Needs the extra ``fuzz`` (atheris). Bytes that crash a reader are written as
``crash-*``; each becomes a case of hostile_dicom.py or hostile_nifti.py.
"""

import argparse
import faulthandler
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["covtanet", "nibabel", "pydicom"]):
    from hostile import CATALOGUE, CONTROLS
    from sound_input import gz, plain_nifti, slices

    from covtanet.ct import dicom, dicom_headers, nifti
    from covtanet.errors import StudyError

MEMORY_MIB = 6144
LONGEST_S = 20


def read_nifti(data: bytes) -> None:
    """Read one NIfTI file."""
    try:
        nifti.read(data)
    except (StudyError, MemoryError):  # the sandbox turns a MemoryError into a refusal
        return


def read_dicom(data: bytes) -> None:
    """Read an object in place of a sound one, and its header as the listing does."""
    dicom_headers.read_identity(data[:4096])
    try:
        dicom.read_series([*slices()[:3], data, *slices()[4:]])
    except (StudyError, MemoryError):
        return


READERS = {"nifti": read_nifti, "dicom": read_dicom}


def in_time(read: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Return the reader with a time-out that prints a traceback; libFuzzer's alarm kills Python."""

    def watched(data: bytes) -> None:
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        read(data)
        faulthandler.cancel_dump_traceback_later()

    return watched


def seeds(kind: str, folder: Path) -> None:
    """Write sound, odd and malformed input, from which the search starts."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [build() for name, build in CONTROLS.items() if name.startswith(kind)]
    cases += [
        build()
        for name, (_, build) in CATALOGUE.items()
        if name.startswith(kind) and "bomb" not in name
    ]
    contents = [max(case.values(), key=len) for case in cases] + (
        [gz(plain_nifti())] if kind == "nifti" else []
    )
    for index, data in enumerate(contents):
        (folder / f"{index:03d}").write_bytes(data)


def main() -> None:
    """Search for some minutes; end with an error if a reader crashes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("reader", choices=READERS)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--runs", type=int, default=0, help="end after so many inputs instead")
    options.add_argument("--corpus", type=Path, default=Path(".fuzz"))
    options.add_argument(
        "--seed", type=int, default=0, help="of the search; 0: a new one every time"
    )
    arguments = options.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    corpus = arguments.corpus / arguments.reader
    seeds(arguments.reader, corpus)
    command = [
        sys.argv[0],
        str(corpus),
        f"-runs={arguments.runs}"
        if arguments.runs
        else f"-max_total_time={int(arguments.minutes * 60)}",
        "-timeout=100000",
        f"-rss_limit_mb={MEMORY_MIB}",
        "-max_len=200000",
        f"-artifact_prefix={arguments.corpus}/crash-",
        "-verbosity=0",
        "-print_final_stats=1",
        f"-seed={arguments.seed}",
    ]
    atheris.Setup(command, in_time(READERS[arguments.reader]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

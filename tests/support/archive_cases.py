"""Cases of real archives beside plain series, each with the ledger row that is right for it.

python tests/support/archive_cases.py FOLDER           write every case into a folder below FOLDER
python tests/support/archive_cases.py --check LEDGER   compare a ledger of it with the right rows

FOLDER is a local path; LEDGER a folder, an s3:// prefix or one committed file. The numbers in the
names group cases of one kind. The right row follows from the standards and ``docs/input.md``, not
from the behaviour of the readers.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import cases_anatomy
import cases_dicom_copies
import cases_dicom_image_types
import cases_dicom_pixels
import cases_dicom_series
import cases_geometry
import cases_nifti
from right_rows import Case, Record, faults

from covtanet.ledger.read import read_run
from covtanet.ledger.view import newest_rows

CASES: dict[str, Case] = dict(
    sorted(
        [
            *cases_geometry.cases(),
            *cases_anatomy.cases(),
            *cases_nifti.cases(),
            *cases_dicom_copies.cases(),
            *cases_dicom_image_types.cases(),
            *cases_dicom_pixels.cases(),
            *cases_dicom_series.cases(),
        ]
    )
)
# 300 MB and a minute each.
LARGE: dict[str, Case] = {"43_nearly_2000_slices": cases_dicom_pixels.nearly_2000_slices}


def case_of(source_uri: str) -> str | None:
    """Return the case whose folder a row comes from."""
    cases = [part for part in source_uri.split("/") if part in CASES or part in LARGE]
    return cases[-1] if cases else None


def check(records: Iterable[Record], cases: Mapping[str, Case] = CASES) -> dict[str, list[str]]:
    """Return the faults of a ledger's rows by case; an empty list for a case that is right."""
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(case_of(record["source_uri"]) or "", []).append(record)
    faults_by_case = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            right = case(Path(folder) / name, name)
        rows = by_case.get(name, [])
        case_faults = []
        if len(rows) != right.num_rows:
            case_faults.append(f"{len(rows)} rows, right are {right.num_rows}")
        for record in rows:
            case_faults += faults(record, right)
        faults_by_case[name] = case_faults
    return faults_by_case


def main() -> int:
    """Write the archive, or compare a ledger of it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder of the archive, which is written"
    )
    parser.add_argument(
        "--check",
        default="",
        metavar="LEDGER",
        help="a committed ledger of the archive",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="write the cases of hundreds of MB as well",
    )
    arguments = parser.parse_args()
    if (arguments.folder is None) == (not arguments.check):
        parser.error("expected FOLDER or --check LEDGER")
    if arguments.folder is not None:
        for name, case in {**CASES, **(LARGE if arguments.large else {})}.items():
            case(arguments.folder / name, name)
        sys.stdout.write(f"{len(CASES)} cases in {arguments.folder}\n")
        return 0

    is_file = arguments.check.endswith(".parquet")
    table = read_run(arguments.check) if is_file else newest_rows(arguments.check)
    faults_by_case = check(table.to_pylist())
    for name, wrong in faults_by_case.items():
        verdict = f"wrong: {'; '.join(wrong)}" if wrong else "right"
        sys.stdout.write(f"{name:45s} {verdict}\n")
    num_wrong = sum(bool(wrong) for wrong in faults_by_case.values())
    sys.stdout.write(
        f"{len(faults_by_case) - num_wrong} of {len(faults_by_case)} cases are right\n"
    )
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

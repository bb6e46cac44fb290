"""The ledger row that is right for a series, and the faults of another row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from chests import chest, lung_ml
from numpy.typing import NDArray

from covtanet.phantoms.phantom import Phantom

SCREENED, REJECTED = "screened", "rejected"
Record = dict[str, Any]
HIDE_INVOLVEMENT = {"partial_lungs", "implausible_lungs"}
# A model without a trained diagnosis adds it to every row.
OF_THE_MODEL = {"no_diagnosis"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A ledger row that is right for a series.

    reasons: any of them, for a rejected series. flags: all of them and none beside them but
    ``optional``. lung_ml: the true lung volume, null if the row need not tell; tolerance: how far
    from it, as a share. spacing_mm: z, y, x.
    """

    status: str = SCREENED
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lung_ml: float | None = None
    tolerance: float = 0.1
    spacing_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Right:
    """The right outcome of a case: each of its rows is one of ``rows``.

    num_ignored: objects that are no row but counted. hu: the volume's HU bit for bit, (z, y, x).
    aspect: width over height of the body in the middle slice, as the network must see it.
    unsegmented: slices that it may not see.
    """

    rows: tuple[Row, ...]
    num_rows: int = 1
    num_ignored: int = 0
    hu: NDArray[Any] | None = field(default=None, repr=False)
    aspect: float | None = None
    unsegmented: tuple[int, ...] = ()


# A folder and the case's name -> the right outcome.
Case = Callable[[Path, str], Right]


def sound(phantom: Phantom | None = None, *flags: str, **more: Any) -> Row:
    """Return the row of a chest that is screened as it is, with its true lung volume."""
    return Row(flags=flags, lung_ml=lung_ml(phantom or chest()), **more)


def refused(*reasons: str) -> Row:
    """Return a rejected row with one of some reasons."""
    return Row(status=REJECTED, reasons=reasons)


def faults(record: Record, right: Right) -> list[str]:
    """Return the faults of a row against the right row that it is nearest to."""
    return min((_faults_of_row(record, row) for row in right.rows), key=len)


def _faults_of_row(record: Record, row: Row) -> list[str]:
    if record["status"] != row.status:
        reason = record.get("reason") or ", ".join(record["qc_flags"])
        expected = f"{row.status} {' or '.join((*row.reasons, *row.flags))}".rstrip()
        return [f"{record['status']} ({reason}), right is {expected}"]
    if row.status != SCREENED:
        if not row.reasons or record["reason"] in row.reasons:
            return []
        return [f"reason {record['reason']}, right is {' or '.join(row.reasons)}"]
    faults = []
    flags = set(record["qc_flags"]) - OF_THE_MODEL
    faults += [f"flag {flag} is missing" for flag in row.flags if flag not in flags]
    faults += [f"flag {flag} is wrong" for flag in sorted(flags - {*row.flags, *row.optional})]
    is_hidden = bool(flags & HIDE_INVOLVEMENT)
    if (record["involvement"] is None) != is_hidden:
        faults.append(f"involvement is {record['involvement']} with flags {sorted(flags)}")
    return faults + _faults_of_volume(record, row)


def _faults_of_volume(record: Record, row: Row) -> list[str]:
    volume_ml = record["lung_volume_ml"]
    if "unknown_spacing" in row.flags:
        lesion_ml = record["lesion_volume_ml"]
        is_null = volume_ml is None and lesion_ml is None
        return [] if is_null else [f"{volume_ml} and {lesion_ml} ml from nominal voxels"]
    faults = []
    if row.lung_ml is not None and abs(volume_ml / row.lung_ml - 1) > row.tolerance:
        faults.append(f"lung of {volume_ml:.0f} ml, true are {row.lung_ml:.0f} ml")
    spacing = tuple(record[f"spacing_{axis}_mm"] for axis in "zyx")
    if row.spacing_mm is not None and not np.allclose(spacing, row.spacing_mm, rtol=2e-3):
        faults.append(f"spacing {spacing}, true is {row.spacing_mm}")
    return faults

"""A ledger against a known truth: statuses, reasons, diagnosis, severity and lesion overlap."""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covtanet import storage
from covtanet.ct import nifti
from covtanet.errors import Status
from covtanet.report.summary import table

MIN_RIGHT_SHARE = 0.9
MIN_MEAN_DICE = 0.7


@dataclass(kw_only=True)
class Agreement:
    """Counts of series that agree. dice: of each screened series that truly has a lesion."""

    series: int = 0
    rows: int = 0
    refused: int = 0
    refused_right: int = 0
    sound: int = 0
    screened: int = 0
    diagnosis_right: int = 0
    severity_right: int = 0
    rule_right: int = 0
    dice: list[float] = field(default_factory=list)
    involvement_error: list[float] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all damaged series have their reason and the sound ones agree well enough.

        That is 90 % of the sound series with the right diagnosis and severity, and a mean Dice of
        0.7.
        """
        num_right = min(self.diagnosis_right, self.severity_right)
        return (
            self.rows == self.series
            and self.refused_right == self.refused
            and num_right >= MIN_RIGHT_SHARE * self.sound
            and bool(self.dice)
            and float(np.mean(self.dice)) >= MIN_MEAN_DICE
        )

    def as_table(self) -> str:
        """Return the counts as text."""
        dice = error = "-"
        if self.dice:
            dice = f"{np.mean(self.dice):.3f} ({min(self.dice):.3f})"
        if self.involvement_error:
            error = f"{np.mean(self.involvement_error):.3f} ({max(self.involvement_error):.3f})"
        refused = f"{self.refused_right} / {self.refused}"
        return table(
            "Agreement with the known truth (phantoms)",
            [
                ("rows / series", f"{self.rows} / {self.series}"),
                ("damaged series refused with their reason", refused),
                ("sound series screened", f"{self.screened} / {self.sound}"),
                ("diagnosis right", f"{self.diagnosis_right} / {self.sound}"),
                ("severity right (null for normal)", f"{self.severity_right} / {self.sound}"),
                ("severity by involvement right", f"{self.rule_right} / {len(self.dice)}"),
                ("lesion Dice, mean (lowest)", dice),
                ("error of involvement, mean (largest)", error),
            ],
        )


def compare(ledger: pa.Table, archive: str, truth_uri: str, results: str) -> Agreement:
    """Compare a run's ledger and result masks with ``truth.parquet`` and its masks."""
    truth_table = storage.read_bytes(storage.join(truth_uri, "truth.parquet"))
    truth_rows = pq.read_table(BytesIO(truth_table)).to_pylist()
    rows = {row["source_uri"]: row for row in ledger.to_pylist()}
    agreement = Agreement(series=len(truth_rows), rows=ledger.num_rows)
    for expected in truth_rows:
        row = rows.get(storage.join(archive, expected["source_path"]))
        if row is None:
            continue
        if expected["status"] == Status.REJECTED:
            is_rejected = row["status"] == Status.REJECTED
            agreement.refused += 1
            agreement.refused_right += is_rejected and row["reason"] == expected["reason"]
        else:
            _count_sound(agreement, row, expected, truth_uri, results)
    return agreement


def _count_sound(
    agreement: Agreement,
    row: dict[str, Any],
    expected: dict[str, Any],
    truth_uri: str,
    results: str,
) -> None:
    """Add one sound series to the counts, in place."""
    is_screened = row["status"] == Status.SCREENED
    agreement.sound += 1
    agreement.screened += is_screened
    agreement.diagnosis_right += row["diagnosis"] == expected["diagnosis"]
    agreement.severity_right += is_screened and row["severity"] == expected["severity"]
    if expected["diagnosis"] == "normal":
        return
    if not is_screened:
        agreement.dice.append(0.0)
        return
    agreement.rule_right += row["severity_by_involvement"] == expected["severity"]
    if row["involvement"] is not None:
        agreement.involvement_error.append(abs(row["involvement"] - expected["involvement"]))
    predicted_uri = storage.join(results, row["run_id"], row["series_key"], "lesion_mask.nii.gz")
    truth = _read_mask(storage.join(truth_uri, expected["lesion_mask_path"]))
    agreement.dice.append(_dice(_read_mask(predicted_uri), truth))


def _read_mask(uri: str) -> NDArray[np.bool_]:
    return np.asarray(nifti.read_labels(storage.read_bytes(uri)) > 0)


def _dice(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    overlap = float(np.count_nonzero(left & right))
    return 2 * overlap / float(np.count_nonzero(left) + np.count_nonzero(right))

"""A ledger against a known truth: statuses, reasons, diagnosis, severity and lesion overlap."""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.ct import nifti
from covtanet.errors import Status
from covtanet.report.summary import table


@dataclass(kw_only=True)
class Agreement:
    """Counts of what agrees. dice: of each screened series that truly has a lesion."""

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
        """Every damaged series refused for its reason, 90 % of the sound ones right, mean Dice of 0.7."""
        return (
            self.rows == self.series
            and self.refused_right == self.refused
            and min(self.diagnosis_right, self.severity_right) >= 0.9 * self.sound
            and bool(self.dice)
            and float(np.mean(self.dice)) >= 0.7
        )

    def as_table(self) -> str:
        """The figures as text."""
        return table(
            "Agreement with the known truth (phantoms)",
            [
                ("rows / series", f"{self.rows} / {self.series}"),
                (
                    "damaged series refused with their reason",
                    f"{self.refused_right} / {self.refused}",
                ),
                ("sound series screened", f"{self.screened} / {self.sound}"),
                ("diagnosis right", f"{self.diagnosis_right} / {self.sound}"),
                ("severity right (null for normal)", f"{self.severity_right} / {self.sound}"),
                ("severity by involvement right", f"{self.rule_right} / {len(self.dice)}"),
                (
                    "lesion Dice, mean (lowest)",
                    f"{np.mean(self.dice):.3f} ({min(self.dice):.3f})" if self.dice else "-",
                ),
                (
                    "error of involvement, mean (largest)",
                    f"{np.mean(self.involvement_error):.3f} ({max(self.involvement_error):.3f})"
                    if self.involvement_error
                    else "-",
                ),
            ],
        )


def compare(ledger: pa.Table, archive: str, truth_uri: str, results: str) -> Agreement:
    """Compare a run's ledger and result masks with ``truth.parquet`` and its masks."""
    truth = pq.read_table(
        BytesIO(storage.read_bytes(storage.join(truth_uri, "truth.parquet")))
    ).to_pylist()
    rows = {row["source_uri"]: row for row in ledger.to_pylist()}
    found = Agreement(series=len(truth), rows=ledger.num_rows)
    for expected in truth:
        row = rows.get(storage.join(archive, expected["source_path"]))
        if row is None:
            continue
        if expected["status"] == Status.REJECTED:
            found.refused += 1
            found.refused_right += (
                row["status"] == Status.REJECTED and row["reason"] == expected["reason"]
            )
        else:
            _compare_sound(found, row, expected, truth_uri, results)
    return found


def _compare_sound(
    found: Agreement, row: dict[str, Any], expected: dict[str, Any], truth_uri: str, results: str
) -> None:
    found.sound += 1
    found.screened += row["status"] == Status.SCREENED
    found.diagnosis_right += row["diagnosis"] == expected["diagnosis"]
    found.severity_right += (
        row["status"] == Status.SCREENED and row["severity"] == expected["severity"]
    )
    if expected["diagnosis"] == "normal":
        return
    if row["status"] != Status.SCREENED:
        found.dice.append(0.0)
        return
    found.rule_right += row["severity_by_involvement"] == expected["severity"]
    if row["involvement"] is not None:
        found.involvement_error.append(abs(row["involvement"] - expected["involvement"]))
    predicted_uri = storage.join(results, row["run_id"], row["series_key"], "lesion_mask.nii.gz")
    predicted = nifti.read_labels(storage.read_bytes(predicted_uri)) > 0
    truth = (
        nifti.read_labels(storage.read_bytes(storage.join(truth_uri, expected["lesion_mask_path"])))
        > 0
    )
    overlap = float(np.count_nonzero(predicted & truth))
    found.dice.append(2 * overlap / float(np.count_nonzero(predicted) + np.count_nonzero(truth)))

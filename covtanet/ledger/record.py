"""The typed record of one series: the columns of its ledger row that do not belong to the run."""

from dataclasses import dataclass, fields, replace
from typing import Any

from covtanet.errors import QcFlag, Reason, Status

# Fields that the listing knows; a record without a measurement keeps them.
IDENTITY = (
    "series_key", "source_uri", "source_format", "source_version", "num_objects", "num_bytes",
    "study_uid", "series_uid", "started_at",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a series is not screened."""

    status: Status
    reason: Reason
    detail: str
    """The reason in words, without any text of the input."""


@dataclass(frozen=True, kw_only=True)
class ScreeningRecord:
    """The result of one series so far. The columns' meaning stands in ``covtanet.ledger.schema``.

    A record is never changed: every stage returns another one.
    """

    series_key: str
    source_uri: str
    source_format: str
    source_version: str
    num_objects: int
    num_bytes: int | None
    started_at: float
    """Time in seconds since the epoch at which work on the series began; not a column."""
    study_uid: str | None = None
    series_uid: str | None = None
    source_digest: str | None = None
    status: Status | None = None
    """Null as long as the series is in work."""
    reason: Reason | None = None
    reason_detail: str | None = None
    qc_flags: tuple[QcFlag, ...] = ()
    num_slices: int | None = None
    num_slices_segmented: int | None = None
    spacing_z_mm: float | None = None
    spacing_y_mm: float | None = None
    spacing_x_mm: float | None = None
    p_infected: float | None = None
    p_severe: float | None = None
    diagnosis: str | None = None
    severity: str | None = None
    severity_by_involvement: str | None = None
    lesion_volume_ml: float | None = None
    lung_volume_ml: float | None = None
    involvement: float | None = None
    lesion_slices: int | None = None
    decode_s: float | None = None
    predict_s: float | None = None
    engine: str | None = None

    def with_flag(self, flag: QcFlag) -> "ScreeningRecord":
        """Return the record with one more flag; a flag stands once."""
        return replace(self, qc_flags=tuple(dict.fromkeys((*self.qc_flags, flag))))

    def refused(self, refusal: Refusal) -> "ScreeningRecord":
        """Return the record of a series that ends without a measurement.

        Flags, digest and times stay; every number that a stage had already filled is null again.
        """
        return replace(
            self,
            status=refusal.status,
            reason=refusal.reason,
            reason_detail=refusal.detail,
            num_slices=None,
            num_slices_segmented=None,
            spacing_z_mm=None,
            spacing_y_mm=None,
            spacing_x_mm=None,
            p_infected=None,
            p_severe=None,
        )

    def identity(self) -> "ScreeningRecord":
        """Return a record of the same series in which nothing else is filled."""
        return ScreeningRecord(**{name: getattr(self, name) for name in IDENTITY})

    def to_columns(self) -> dict[str, Any]:
        """Return plain values by column name, as workers and the ledger exchange them."""
        columns = {item.name: getattr(self, item.name) for item in fields(self)}
        columns["qc_flags"] = list(map(str, self.qc_flags))
        columns["status"] = self.status and str(self.status)
        columns["reason"] = self.reason and str(self.reason)
        return columns

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> "ScreeningRecord":
        """Return the record of ``to_columns``; other columns are left out."""
        values = {item.name: columns[item.name] for item in fields(cls)}
        values["qc_flags"] = tuple(QcFlag(flag) for flag in values["qc_flags"])
        if values["status"] is not None:
            values["status"] = Status(values["status"])
        if values["reason"] is not None:
            values["reason"] = Reason(values["reason"])
        return cls(**values)

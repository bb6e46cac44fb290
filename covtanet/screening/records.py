"""A series between the stages of screening.

``to_row`` and ``from_row`` turn it into the columns in which Ray Data moves it between workers and
back. The raw volume is never part of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import Involvement
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.ledger.record import ScreeningRecord


@dataclass(frozen=True, kw_only=True)
class PreparedSeries:
    """A decoded series as the network reads it; without slices if it has ended already."""

    record: ScreeningRecord
    slices: NDArray[np.uint16]
    """Intensity of the segmented slices, (S, size, size)."""
    chosen: NDArray[np.int64]
    """Their indices along z in the volume, (S,)."""
    masks: bytes
    """Lung and chest cavity in the source's grid, ``StoredMasks`` packed."""

    def to_row(self) -> dict[str, Any]:
        """Return the series as columns."""
        return {
            **self.record.to_columns(),
            "slices": self.slices,
            "chosen": self.chosen,
            "masks": self.masks,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "PreparedSeries":
        """Return the series of ``to_row``."""
        return cls(
            record=ScreeningRecord.from_columns(row),
            slices=row["slices"],
            chosen=row["chosen"],
            masks=row["masks"],
        )


@dataclass(frozen=True, kw_only=True)
class PredictedSeries:
    """A prepared series with the network's lesion map; without a map if it has ended already."""

    prepared: PreparedSeries
    """The series; its record holds the network's probabilities too."""
    lesion_levels: NDArray[np.uint8]
    """Lesion probability of the segmented slices in steps of 1/254, (S, size, size)."""

    @property
    def record(self) -> ScreeningRecord:
        """The record so far."""
        return self.prepared.record

    def without_slices(self) -> "PredictedSeries":
        """Return the series without the network's input, which only pictures need."""
        slices = np.empty((0, *self.prepared.slices.shape[1:]), np.uint16)
        return replace(self, prepared=replace(self.prepared, slices=slices))

    def to_row(self) -> dict[str, Any]:
        """Return the series as columns."""
        return {**self.prepared.to_row(), "lesion_levels": self.lesion_levels}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "PredictedSeries":
        """Return the series of ``to_row``."""
        return cls(prepared=PreparedSeries.from_row(row), lesion_levels=row["lesion_levels"])


@dataclass(frozen=True, kw_only=True)
class MeasuredSeries:
    """A finished series, with its masks if it was screened."""

    record: ScreeningRecord
    masks: StoredMasks | None = None
    involvement: Involvement | None = None

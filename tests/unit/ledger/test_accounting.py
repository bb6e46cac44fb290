"""The schema of the ledger, and the counts of a run."""

from collections import Counter

import pyarrow as pa

from covtanet.errors import REJECTION_REASONS
from covtanet.ledger.accounting import ACCOUNTED_COLUMNS, Accounting
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report.summary import findings


def test_schema_is_the_promise() -> None:
    """Names and types of version 2, in order; a change needs a new version."""
    expected = """schema_version: int16|run_id: string|run_date: date32[day]
screened_at: timestamp[us, tz=UTC]
series_key: string|source_uri: string|source_format: string
source_version: string|source_digest: string
num_objects: int32|num_bytes: int64|study_uid: string|series_uid: string
status: string|reason: string
reason_detail: string|qc_flags: list<item: string>|num_slices: int32|num_slices_segmented: int32
spacing_z_mm: double|spacing_y_mm: double|spacing_x_mm: double|p_infected: float
diagnosis: string|p_severe: float
severity: string|severity_by_involvement: string|lesion_volume_ml: double|lung_volume_ml: double
involvement: double|lesion_slices: int32|model_name: string
model_version: string|model_digest: string
config_digest: string|software_version: string|decode_s: double|predict_s: double
engine: string"""
    assert [
        f"{field.name}: {field.type}".replace("element:", "item:") for field in LEDGER_SCHEMA
    ] == [each for line in expected.splitlines() for each in line.split("|")]
    assert len(set(REJECTION_REASONS)) == len(REJECTION_REASONS) == 24


def counts_of(*rows: tuple[str, str | None, str | None]) -> Accounting:
    counts = Accounting()
    schema = pa.schema([LEDGER_SCHEMA.field(name) for name in ACCOUNTED_COLUMNS])
    for status, reason, diagnosis in rows:
        row = {
            "status": status, "reason": reason, "diagnosis": diagnosis, "severity": None,
            "severity_by_involvement": "severe" if status == "screened" else None,
        }  # fmt: skip
        counts.add(pa.Table.from_pylist([row], schema=schema))
    return counts


def test_accounting_adds_up() -> None:
    counts = counts_of(
        ("screened", None, "infected"), ("rejected", "not_hu", None), ("failed", "storage", None)
    )
    assert counts.series == counts.screened + sum(counts.rejected.values()) + counts.failed
    assert counts.failures == Counter(storage=1)


def test_what_a_model_does_not_say_is_no_count_of_none() -> None:
    """0 infected would be an answer; a segmenter without a diagnosis gave none."""
    assert findings(counts_of(("screened", None, "normal"))) == [
        ("infected", 0), ("severe", 0), ("severe by involvement", 1),
    ]  # fmt: skip
    assert findings(counts_of(("screened", None, None))) == [
        ("infected", "-"), ("severe", "-"), ("severe by involvement", 1),
    ]  # fmt: skip


def test_rows_that_are_alike_count_as_many_as_they_are() -> None:
    schema = pa.schema([LEDGER_SCHEMA.field(name) for name in ACCOUNTED_COLUMNS])
    ill = {"status": "screened", "diagnosis": "infected", "severity": "severe"}
    rows = [{**ill, "severity_by_involvement": "severe"}] * 3
    rows += [{"status": "rejected", "reason": "not_hu"}] * 2 + [{"status": "failed"}] * 4
    counts = Accounting()
    counts.add(pa.Table.from_pylist(rows, schema=schema))
    numbers = (counts.series, counts.screened, counts.diagnosed, counts.infected, counts.severe)
    assert numbers == (9, 3, 3, 3, 3)
    assert (counts.severe_by_involvement, counts.rejected["not_hu"], counts.failed) == (3, 2, 4)

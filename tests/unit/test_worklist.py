"""The night at a glance, the order of the worklist, and the report."""

import json
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa

from covtanet.report import worklist
from covtanet.screening.records import LEDGER_SCHEMA

KEYS = "abcdef"


def row(key: str, **values: Any) -> dict[str, Any]:
    fixed = {
        "schema_version": 1, "run_id": "r", "run_date": date(2026, 11, 23), "series_key": key * 32,
        "screened_at": datetime(2026, 11, 23, tzinfo=UTC) + timedelta(minutes=KEYS.index(key)),
        "source_uri": f"s3://bucket/{key}", "source_format": "nifti", "source_version": "v", "num_objects": 1,
        "num_bytes": 1, "qc_flags": [], "model_name": "covtanet", "model_version": "1", "model_digest": "d" * 64,
        "config_digest": "c", "software_version": "0", "status": "screened",
    }  # fmt: skip
    return {name: {**fixed, **values}.get(name) for name in LEDGER_SCHEMA.names}


def ledger() -> pa.Table:
    rows = [
        row("a", status="rejected", reason="truncated", reason_detail="</script><b>"),
        row("b", p_infected=0.45, diagnosis="normal", involvement=0.0, severity_by_involvement="mild"),
        row("c", p_infected=0.99, diagnosis="infected", severity="severe", p_severe=0.9, involvement=0.4),
        row("d", p_infected=0.9, diagnosis="infected", severity="mild", p_severe=0.1, involvement=0.02,
            qc_flags=["contrast"]),
        row("e", p_infected=0.8, diagnosis="infected", severity="mild", p_severe=0.2, involvement=None),
        row("f", status="failed", reason="storage"),
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, LEDGER_SCHEMA)


def keys(page: dict[str, Any]) -> str:
    return "".join(each["series_key"][0] for each in page["rows"])


def test_worst_have_most_of_the_lung_involved_and_what_is_unknown_comes_behind() -> None:
    assert keys(worklist.page(ledger())) == "cdbeaf"
    assert keys(worklist.page(ledger(), sort="uncertain")) == "bedcaf"
    assert keys(worklist.page(ledger(), sort="refused"))[:2] == "fa"


def test_filters_and_search_leave_the_summary_of_all() -> None:
    for chosen, expected in (
        ({"status": "rejected"}, "a"), ({"grade": "severe"}, "c"), ({"grade": "normal"}, "b"),
        ({"grade": "mild"}, "de"), ({"text": "BUCKET/D"}, "d"), ({"text": "storage"}, "f"), ({"text": "nowhere"}, ""),
    ):  # fmt: skip
        page = worklist.page(ledger(), **chosen)
        assert (keys(page), page["total"]) == (expected, len(expected)), chosen
        assert page["summary"]["series"] == 6


def test_pages_are_short_however_long_the_ledger() -> None:
    table = pa.concat_tables([ledger()] * 100)
    page = worklist.page(table, limit=10_000)
    assert (len(page["rows"]), page["total"]) == (worklist.MAX_ROWS, 600)
    assert keys(worklist.page(ledger(), offset=2, limit=2)) == "be"


def test_the_night_at_a_glance() -> None:
    found = worklist.summary(ledger())
    assert found["status"] == {"failed": 1, "rejected": 1, "screened": 4}
    assert found["diagnosis"] == {"infected": 3, "normal": 1}
    assert found["severity"] == {"mild": 2, "severe": 1}
    assert found["reasons"] == {"storage": 1, "truncated": 1}
    assert found["flags"] == {"contrast": 1}
    assert found["involvement"]["counts"] == [1, 1, 0, 0, 1, 0]
    assert found["studies_per_minute"] is None  # too few for a rate
    assert worklist.summary(pa.concat_tables([ledger()] * 100))["studies_per_minute"] == 599 / 5
    assert found["models"] == ["covtanet 1"]
    json.dumps(found)


def test_a_night_without_studies_has_a_summary_too() -> None:
    page = worklist.page(LEDGER_SCHEMA.empty_table())
    assert (page["total"], page["summary"]["series"], page["summary"]["studies_per_minute"]) == (0, 0, None)


def test_the_report_stands_alone_and_no_text_of_a_ledger_ends_its_data() -> None:
    text = worklist.report(ledger(), {"c" * 32: b"png"})
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "</script><b>" not in text
    (embedded,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(embedded)
    assert keys(data) == "cdbeaf"
    assert data["rows"][4]["reason_detail"] == "</script><b>"
    assert data["pictures"] == {"c" * 32: "data:image/png;base64,cG5n"}
    assert "Research use only" in text

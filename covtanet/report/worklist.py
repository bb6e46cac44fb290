"""The worklist: the summary of a run, and its series in the order in which to read them."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covtanet.data.labels import grade_of
from covtanet.errors import Status
from covtanet.report.page_file import render_page

SORTS = ("worst", "uncertain", "refused")
MAX_ROWS = 200
INVOLVEMENT_EDGES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
SEARCHED = ("series_key", "study_uid", "series_uid", "reason", "reason_detail", "source_uri")
# Of fewer series, the time from the first to the last row says little about the rate.
MIN_SERIES_FOR_RATE = 20


def summary(table: pa.Table) -> dict[str, Any]:
    """Return counts, distribution of severity and involvement, refusals by reason and throughput.

    table: rows of a ledger.
    """
    screened = table.filter(pc.equal(table["status"], Status.SCREENED))
    involvement = screened["involvement"].drop_null().to_numpy()
    return {
        "series": table.num_rows,
        "status": _counts(table["status"]),
        "diagnosis": _counts(screened["diagnosis"]),
        "severity": _counts(screened["severity"]),
        "severity_by_involvement": _counts(screened["severity_by_involvement"]),
        "reasons": _counts(table["reason"]),
        "flags": _counts(pc.list_flatten(table["qc_flags"])),
        "involvement": {
            "edges": list(INVOLVEMENT_EDGES),
            "counts": np.histogram(involvement, INVOLVEMENT_EDGES)[0].tolist(),
        },
        "studies_per_minute": _studies_per_minute(table),
        "models": _models(table),
        "run_date": str(table["run_date"][0].as_py()) if table.num_rows else None,
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}
    return {str(name): counts[name] for name in sorted(counts, key=str) if name is not None}


def _studies_per_minute(table: pa.Table) -> float | None:
    if table.num_rows < MIN_SERIES_FOR_RATE:
        return None
    ends = pc.min_max(table["screened_at"]).as_py()
    minutes = (ends["max"] - ends["min"]).total_seconds() / 60
    # n rows have n - 1 intervals between them.
    return (table.num_rows - 1) / minutes if minutes else None


def _models(table: pa.Table) -> list[str]:
    """Return name and version of every model of a ledger."""
    names = table["model_name"].to_pylist()
    versions = table["model_version"].to_pylist()
    pairs = zip(names, versions, strict=True)
    return sorted({f"{name} {version}" for name, version in pairs})


def order(table: pa.Table, sort: str) -> pa.Table:
    """Return the rows in an order of ``SORTS``.

    worst: by involvement, the largest first, then by probability of infection. uncertain: by the
    distance of the probability of infection to 0.5. refused: series that were not screened first,
    by reason. Rows without these values come last.
    """
    is_screened = pc.equal(table["status"], Status.SCREENED)
    # Rows without the values of the order come last.
    is_last = is_screened if sort == "refused" else pc.invert(is_screened)
    distance = pc.abs(pc.subtract(table["p_infected"], 0.5))
    keyed = table.append_column("_rank", pc.cast(is_last, pa.int8()))
    keyed = keyed.append_column("_distance", distance)
    keys = {
        "worst": [("involvement", "descending"), ("p_infected", "descending")],
        "uncertain": [("_distance", "ascending")],
        "refused": [("reason", "ascending")],
    }[sort]
    # The series key makes the order of equal rows stable from page to page.
    by = [("_rank", "ascending"), *keys, ("series_key", "ascending")]
    return keyed.sort_by(by).select(table.column_names)


def select(table: pa.Table, status: str = "", grade: str = "", text: str = "") -> pa.Table:
    """Return the rows with a status, a grade of the network, and a text in their names or reason.

    status, grade, text: empty selects all. grade: normal, mild or severe.
    """
    if status:
        table = table.filter(pc.equal(table["status"], status))
    if grade == "normal":
        table = table.filter(pc.equal(table["diagnosis"], "normal"))
    elif grade:
        table = table.filter(pc.equal(table["severity"], grade))
    if text:
        table = table.filter(_contains(table, text))
    return table


def _contains(table: pa.Table, text: str) -> Any:
    """Return for every row whether a searched column contains the text, in upper or lower case."""
    is_match = pa.scalar(False)
    for name in SEARCHED:
        if name in table.column_names:
            in_column = pc.match_substring(table[name], text, ignore_case=True)
            is_match = pc.or_(is_match, pc.fill_null(in_column, False))
    return is_match


def page(
    table: pa.Table,
    *,
    sort: str = "worst",
    status: str = "",
    grade: str = "",
    text: str = "",
    offset: int = 0,
    limit: int = MAX_ROWS,
) -> dict[str, Any]:
    """Return at most ``MAX_ROWS`` selected rows from ``offset`` on, their number, and the summary.

    The summary is of all rows of the table.
    """
    selected = select(table, status, grade, text)
    # The limit holds whatever the caller asks for.
    rows = order(selected, sort).slice(offset, min(limit, MAX_ROWS))
    return {
        "summary": summary(table),
        "total": selected.num_rows,
        "offset": offset,
        "rows": as_json_rows(rows),
    }


def as_json_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows with their times as ISO 8601."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        row["screened_at"] = row["screened_at"].isoformat()
        row["run_date"] = row["run_date"].isoformat()
    return rows


def report(table: pa.Table, pictures: Mapping[str, bytes]) -> str:
    """Return the worklist as one HTML file: the worst rows with pictures, and the summary of all.

    The page filters by ``grades`` and ``texts`` and takes the order from ``orders``, so that it
    ranks nothing itself. pictures: PNG by series key.
    """
    shown = order(table, "worst").slice(0, MAX_ROWS)
    numbered = shown.append_column("_index", pa.array(range(shown.num_rows), pa.int32()))
    rows = as_json_rows(shown)
    data = {
        "summary": summary(table),
        "rows": rows,
        "orders": {sort: order(numbered, sort)["_index"].to_pylist() for sort in SORTS},
        "grades": [grade_of(row["diagnosis"], row["severity"]) for row in rows],
        "texts": [_searched_text(row) for row in rows],
        "pictures": {key: _data_url(png) for key, png in sorted(pictures.items())},
    }
    return render_page(data)


def _searched_text(row: dict[str, Any]) -> str:
    values = [str(row[name]) for name in SEARCHED if row.get(name)]
    return "\n".join(values).lower()


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

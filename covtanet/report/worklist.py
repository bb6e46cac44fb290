"""A night at a glance, and its studies in the order in which somebody should look at them."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PAGE = Path(__file__).parent / "page"
SORTS = ("worst", "uncertain", "refused")
MAX_ROWS = 200
INVOLVEMENT_EDGES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
SEARCHED = ("series_key", "study_uid", "series_uid", "reason", "reason_detail", "source_uri")


def summary(table: pa.Table) -> dict[str, Any]:
    """Counts, distribution of severity and involvement, refusals by reason, throughput. table: rows of a ledger."""
    screened = table.filter(pc.equal(table["status"], "screened"))
    involvement = screened["involvement"].drop_null().to_numpy()
    minutes = None
    if (
        table.num_rows >= MIN_SERIES_FOR_RATE
    ):  # of fewer, the span between the first and the last says little
        first, last = (pc.min_max(table["screened_at"])[name].as_py() for name in ("min", "max"))
        minutes = (last - first).total_seconds() / 60
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
        "studies_per_minute": (table.num_rows - 1) / minutes if minutes else None,
        "models": sorted(
            {f"{n} {v}" for n, v in zip(*(table[k].to_pylist() for k in MODEL), strict=True)}
        ),
        "run_date": str(table["run_date"][0].as_py()) if table.num_rows else None,
    }


MODEL = ("model_name", "model_version")
MIN_SERIES_FOR_RATE = 20


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = {each["values"]: each["counts"] for each in pc.value_counts(column).to_pylist()}
    return {str(name): counted[name] for name in sorted(counted, key=str) if name is not None}


def order(table: pa.Table, sort: str) -> pa.Table:
    """Rows in an order of ``SORTS``.

    worst: most of the lung first. uncertain: closest to the border between normal and infected. refused: what was not
    screened. What an order does not speak of comes behind.
    """
    is_screened = pc.equal(table["status"], "screened")
    rank = pc.invert(is_screened) if sort != "refused" else is_screened
    distance = pc.abs(pc.subtract(table["p_infected"], 0.5))
    keyed = table.append_column("_rank", pc.cast(rank, pa.int8())).append_column(
        "_distance", distance
    )
    keys = {
        "worst": [("involvement", "descending"), ("p_infected", "descending")],
        "uncertain": [("_distance", "ascending")],
        "refused": [("reason", "ascending")],
    }[sort]
    by = [("_rank", "ascending"), *keys, ("series_key", "ascending")]
    return keyed.sort_by(by).select(table.column_names)


def select(table: pa.Table, status: str = "", grade: str = "", text: str = "") -> pa.Table:
    """Rows of a status, of a grade (normal, mild, severe by the network), and with a text in what names them."""
    if status:
        table = table.filter(pc.equal(table["status"], status))
    if grade == "normal":
        table = table.filter(pc.equal(table["diagnosis"], "normal"))
    elif grade:
        table = table.filter(pc.equal(table["severity"], grade))
    if text:
        hits = [
            pc.fill_null(pc.match_substring(table[name], text, ignore_case=True), False)
            for name in SEARCHED
            if name in table.column_names
        ]
        found = hits[0]
        for hit in hits[1:]:
            found = pc.or_(found, hit)
        table = table.filter(found)
    return table


def page(
    table: pa.Table, *, sort: str = "worst", status: str = "", grade: str = "", text: str = "", offset: int = 0,
    limit: int = MAX_ROWS,
) -> dict[str, Any]:  # fmt: skip
    """At most ``MAX_ROWS`` rows from ``offset`` on, how many there are, and the summary of all."""
    chosen = select(table, status, grade, text)
    rows = order(chosen, sort).slice(offset, min(limit, MAX_ROWS)).to_pylist()
    for row in rows:
        row["screened_at"], row["run_date"] = (
            row["screened_at"].isoformat(),
            row["run_date"].isoformat(),
        )
    return {"summary": summary(table), "total": chosen.num_rows, "offset": offset, "rows": rows}


def report(table: pa.Table, pictures: dict[str, bytes]) -> str:
    """The worklist as one HTML file that needs nothing else: the worst rows with pictures, and the summary of all.

    pictures: PNG by series key.
    """
    data = page(table)
    data["pictures"] = {
        key: f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for key, png in sorted(pictures.items())
    }
    text = (PAGE / "index.html").read_text()
    # Within a script element only "<" could end it or open another.
    embedded = json.dumps(data).replace("<", "\\u003c")
    style, script = ((PAGE / name).read_text() for name in ("worklist.css", "worklist.js"))
    for marker, replacement in (
        ('<link rel="stylesheet" href="worklist/worklist.css">', f"<style>\n{style}</style>"),
        (
            '<script src="worklist/worklist.js"></script>',
            f'<script id="data" type="application/json">{embedded}</script>\n<script>\n{script}</script>',
        ),
    ):
        before, found, after = text.partition(marker)
        if not found:
            raise ValueError("the page has another form than the report expects")
        text = before + replacement + after
    return text

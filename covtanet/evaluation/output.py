"""Files of an evaluation: metrics as JSON and CSV, the paper's tables, rows, and plots."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covtanet.evaluation import metrics, rows
from covtanet.evaluation.overlap_text import overlap_text
from covtanet.report import plots
from covtanet.report.tables import Table, paper_tables

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Everything that an evaluation writes, and its tables as text."""

    files: dict[str, bytes]
    """By path below the output folder."""
    text: str


def make_output(
    evaluation_rows: Sequence[Row],
    about: Mapping[str, Any],
    measured_on: str,
    *,
    is_second_data_set: bool,
) -> Output:
    """Derive every metric from the rows; return tables and files.

    about: identity of the model or experiment, for metrics.json. is_second_data_set: Table III
    rather than Tables I, II and IV.
    """
    summary = metrics.summarise(evaluation_rows)
    tables = paper_tables(summary, measured_on, is_second_data_set=is_second_data_set)
    parts = [table.as_markdown() for table in tables]
    if any(network["classification"]["num_volumes"] for network in summary.values()):
        parts.append(auc_of_pairs(summary))
    text = "\n".join([*parts, overlap_text(summary)])
    described = {
        **about,
        "measured_on": measured_on,
        "research_use_only": True,
        "networks": summary,
    }
    files = {
        "metrics.json": (json.dumps(described, indent=1, sort_keys=True) + "\n").encode(),
        "tables.md": f"{text}\n".encode(),
        "metrics.csv": flat_csv(summary).encode(),
        "rows.parquet": rows.to_parquet(list(evaluation_rows)),
    }
    for table in tables:
        files |= _table_files(table)
    for name, network in summary.items():
        files |= _plots(name, network["classification"], evaluation_rows)
    return Output(files=files, text=text)


def _table_files(table: Table) -> dict[str, bytes]:
    """Return a table as CSV and as a picture, named after its number."""
    name = re.sub(r"\W+", "-", table.title.partition(",")[0].lower())
    return {f"{name}.csv": table.as_csv().encode(), f"{name}.png": plots.bars(table)}


def _plots(name: str, pairs: Mapping[str, Any], evaluation_rows: Sequence[Row]) -> dict[str, bytes]:
    """Return the plots of a network that has a diagnosis."""
    if not pairs["num_volumes"]:
        return {}
    network_rows = [row for row in evaluation_rows if row["network"] == name]
    return {
        f"{name}-confusion.png": plots.confusion(name, pairs),
        f"{name}-roc.png": plots.roc(name, network_rows, pairs),
        f"{name}-reliability.png": plots.reliability(name, pairs),
    }


def flat_csv(summary: Mapping[str, Any]) -> str:
    """Return one line per metric: network, path in metrics.json, value; null as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "figure", "value"])
    for network, values in summary.items():
        for path, value in _leaves(values, ""):
            writer.writerow([network, path, value])
    return out.getvalue()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of every number in nested objects and lists."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        yield from _leaves(inner, f"{path}/{name}" if path else str(name))


def auc_of_pairs(summary: Mapping[str, Any]) -> str:
    """Return AUC and 95 % interval of each pair over all folds, and the folds' mean, as Markdown.

    Over all folds the probabilities of several models are ranked together, which lowers the AUC if
    their scales differ.
    """
    lines = [
        "### AUC of the pairs of grades, 95 % interval by bootstrap over volumes, mean of folds",
        "",
        f"| network | {' | '.join(metrics.PAIRS)} |",
        "|---|" + "---|" * len(metrics.PAIRS),
    ]
    for name, network in summary.items():
        if network["classification"]["num_volumes"]:
            cells = [_auc_text(network, pair) for pair in metrics.PAIRS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _auc_text(network: Mapping[str, Any], pair: str) -> str:
    values = network["classification"][pair]
    if values.get("auc") is None:
        return "-"
    parts = [fold["classification"].get(pair, {}) for fold in network["folds"].values()]
    aucs = [part["auc"] for part in parts if part.get("auc") is not None]
    interval = f"{values['auc_low']:.3f} to {values['auc_high']:.3f}"
    mean = f"{sum(aucs) / len(aucs):.3f}" if aucs else "-"
    return f"{values['auc']:.3f} ({interval}), {mean}"

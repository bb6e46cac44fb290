"""What a job prints at its end, as plain text."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from covtanet.ledger.accounting import Accounting
    from covtanet.ledger.run import Run
    from covtanet.screening.plan import Plan


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Two aligned columns under a title."""
    lines = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        ["", title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in lines)]
    )


def screening_table(run: "Run", counts: "Accounting", elapsed_s: float) -> str:
    """The night at a glance."""
    rows: list[tuple[str, object]] = [("series", counts.series), ("screened", counts.screened)]
    rows.append(("rejected", sum(counts.rejected.values())))
    rows += [(f"  {reason}", count) for reason, count in counts.rejected.most_common()]
    rows.append(("failed", counts.failed))
    rows += [(f"  {reason}", count) for reason, count in counts.failures.most_common()]
    rows += findings(counts)
    rows.append(
        ("studies per minute", f"{counts.series / elapsed_s * 60:.1f}" if elapsed_s else "-")
    )
    rows.append(("ledger", run.committed_uri))
    return table(f"Screening {run.run_date} (research use only)", rows)


def findings(counts: "Accounting") -> list[tuple[str, object]]:
    """How many are infected and severe; a dash, not 0, where the model has no diagnosis."""
    by_network = (counts.infected, counts.severe) if counts.diagnosed else ("-", "-")
    by_rule = ("severe by involvement", counts.severe_by_involvement)
    return [*zip(("infected", "severe"), by_network, strict=True), by_rule]


def plan_table(run: "Run", planned: "Plan", manifest: Iterable[dict[str, Any]]) -> str:
    """What a run would do."""
    formats: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for row in manifest:
        formats[row["source_format"]] += 1
        if row["reason"]:
            refused[row["reason"]] += 1
    rows: list[tuple[str, object]] = [("series (expected rows)", planned.num_series)]
    rows += [(f"  {name}", count) for name, count in sorted(formats.items())]
    rows += [
        (f"  refused by listing: {reason}", count) for reason, count in sorted(refused.items())
    ]
    rows += [
        ("already finished", planned.num_finished),
        ("bytes", f"{planned.num_bytes / 1e6:.1f} MB"),
        ("cluster", f"{planned.num_cpus} CPUs, {planned.num_gpus} GPUs: fits"),
        ("workers", f"{planned.num_decoders} decoding, {planned.num_predictors} predicting"),
        ("would write", run.committed_uri),
    ]
    return table(f"Plan of run {run.run_id}", rows)


def _suffix(path: str) -> str:
    """A file's suffix, or what stands for one: names end in dates and people as well."""
    suffix = PurePosixPath(path).suffix.lower()
    if not suffix:
        return "no suffix"
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", suffix) else "other"


def ignored_line(ignored: pa.Table) -> str:
    """How many objects were no series, by suffix."""
    suffixes = Counter(_suffix(path) for path in ignored["path"].to_pylist())
    counted = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
    return f"ignored, no series: {counted or 'nothing'}"

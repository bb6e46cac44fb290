"""Tables that the commands print at their end, as plain text."""

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

SHORT_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,4}")


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return two aligned columns under a title."""
    lines = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in lines)
    aligned = [f"{name:<{width}}  {value}" for name, value in lines]
    return "\n".join(["", title, "-" * len(title), *aligned])


def screening_table(run: "Run", counts: "Accounting", elapsed_s: float) -> str:
    """Return the counts of a run."""
    rows: list[tuple[str, object]] = [("series", counts.series), ("screened", counts.screened)]
    rows.append(("rejected", sum(counts.rejected.values())))
    rows += [(f"  {reason}", count) for reason, count in counts.rejected.most_common()]
    rows.append(("failed", counts.failed))
    rows += [(f"  {reason}", count) for reason, count in counts.failures.most_common()]
    rows += findings(counts)
    rate = f"{counts.series / elapsed_s * 60:.1f}" if elapsed_s else "-"
    rows.append(("studies per minute", rate))
    rows.append(("ledger", run.committed_uri))
    return table(f"Screening {run.run_date} (research use only)", rows)


def findings(counts: "Accounting") -> list[tuple[str, object]]:
    """Return the numbers of infected and severe series.

    If the model has no diagnosis, they are a dash, not 0.
    """
    return [
        ("infected", counts.infected if counts.diagnosed else "-"),
        ("severe", counts.severe if counts.diagnosed else "-"),
        ("severe by involvement", counts.severe_by_involvement),
    ]


def plan_table(run: "Run", planned: "Plan", manifest: Iterable[dict[str, Any]]) -> str:
    """Return the plan of a run, which has not begun."""
    formats: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for row in manifest:
        formats[row["source_format"]] += 1
        if row["reason"]:
            refused[row["reason"]] += 1
    rows: list[tuple[str, object]] = [("series (expected rows)", planned.num_series)]
    rows += [(f"  {name}", count) for name, count in sorted(formats.items())]
    rows += [(f"  refused by listing: {name}", count) for name, count in sorted(refused.items())]
    rows += [
        ("already finished", planned.num_finished),
        ("bytes", f"{planned.num_bytes / 1e6:.1f} MB" if planned.num_bytes else "unknown"),
        ("cluster", f"{planned.num_cpus} CPUs, {planned.num_gpus} GPUs: fits"),
        (
            "workers",
            f"{planned.workers.num_decoders} decoding, {planned.workers.num_predictors} "
            f"predicting, {planned.workers.num_measurers} measuring",
        ),
        ("would write", run.committed_uri),
    ]
    return table(f"Plan of run {run.run_id}", rows)


def ignored_line(ignored: pa.Table) -> str:
    """Return the number of objects that belong to no series, by suffix.

    Of a PACS these are series, by modality.
    """
    kinds = Counter(row["kind"] or _suffix(row["path"]) for row in ignored.to_pylist())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"ignored, no series: {counts or 'nothing'}"


def _suffix(path: str) -> str:
    """Return a file's suffix, or "other" for a long suffix: it may be a name or a date."""
    suffix = PurePosixPath(path).suffix.lower()
    if not suffix:
        return "no suffix"
    return suffix if SHORT_SUFFIX.fullmatch(suffix) else "other"

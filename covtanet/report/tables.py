"""Tables I to IV of the paper in its own rows and columns, with our values below the paper's."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from covtanet.report.paper_values import (
    OVERLAP_COLUMNS,
    PAIRS,
    PAPER_TABLE_I,
    SCORES,
    SWITCHES,
    TABLE_II,
    TABLE_II_COLUMNS,
    TABLE_III,
    TABLE_III_COLUMNS,
    TABLE_IV,
    TICKS,
)

Cell = tuple[float, float | None]  # mean and standard deviation in percent
Row = tuple[str, str, tuple[Cell | None, ...]]  # network, "paper" or "ours", cells
Summary = Mapping[str, Any]

# The one-feature baseline of Table IV: diagnosis and severity from lesion over lung alone.
LESION_SHARE = "Lesion share"
CSV_COLUMNS = ("table", "network", "whose", "column", "mean_percent", "sd_percent", "measured_on")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with two lines per network: the paper's and ours."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    """A cell is None if there is no value."""
    note: str
    about: tuple[str, ...] = ()
    """Further columns that describe the network."""
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Text of these columns, by network."""
    measured: Mapping[str, str] = field(default_factory=dict)
    """Folds and number of volumes of our values, by network."""

    def as_markdown(self) -> str:
        """Return the table as Markdown."""
        columns = (*self.about, *self.columns)
        lines = [
            f"### {self.title}",
            "",
            f"| Network | | {' | '.join(columns)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        for name, whose, cells in self.rows:
            # A network that was not trained has the paper's line alone.
            if any(cells):
                texts = (*self.details.get(name, ()), *map(_text, cells))
                lines.append(f"| {name} | {self._origin(name, whose)} | {' | '.join(texts)} |")
        return "\n".join([*lines, "", self.note, ""])

    def _origin(self, name: str, whose: str) -> str:
        if whose == "ours" and name in self.measured:
            return f"ours, {self.measured[name]}"
        return whose

    def as_csv(self) -> str:
        """Return the table as CSV: one line per value, null as an empty field."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for name, whose, cells in self.rows:
            measured = self.measured.get(name, "") if whose == "ours" else ""
            for column, cell in zip(self.columns, cells, strict=True):
                mean, deviation = cell or ("", None)
                shown = "" if deviation is None else deviation
                writer.writerow([self.title, name, whose, column, mean, shown, measured])
        return out.getvalue()


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    mean, deviation = cell
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f}±{deviation:.2f}"


def paper_tables(summary: Summary, measured_on: str, *, is_second_data_set: bool) -> list[Table]:
    """Return the tables of a summary (``metrics.summarise``).

    is_second_data_set: Table III instead of Tables I, II and IV. Our values are means over the
    folds' means per volume. Choice: per volume, since the paper's values cannot be pooled, and F1
    weighted by class.
    """
    names = ours_by_name(summary)
    note = (
        f"Ours: {measured_on}; mean over test volumes, ± standard deviation over folds"
        f"{_pixels(summary)}."
    )
    if is_second_data_set:
        return [_overlap("Table III", TABLE_III_COLUMNS, TABLE_III, names, note)]
    title = "Table II, lesion segmentation"
    table_ii = _overlap(title, TABLE_II_COLUMNS, TABLE_II, names, note)
    return [_table_i(summary, note), table_ii, _table_iv(names, note)]


def _pixels(summary: Summary) -> str:
    """Return in which pixels lesions were counted; empty if no network marks lesions."""
    parts = [network["segmentation"] for network in summary.values()]
    num_volumes = sum(part["num_volumes"] for part in parts)
    num_in_source = sum(part.get("num_in_source_grid", 0) for part in parts)
    if not num_volumes:
        return ""
    if num_in_source == num_volumes:
        return "; pixels of the source within the lungs, as screening measures"
    if not num_in_source:
        return "; pixels of the network's input, without a lung mask"
    return (
        "; pixels of the source within the lungs, as screening measures, but for grey values "
        "without a line to HU and single slices, of the network's input without a lung mask"
    )


def ours_by_name(summary: Summary) -> dict[str, Any]:
    """Return our networks under the names of Tables II to IV.

    V1 is the Unet; V8, or V7 if V8 was not trained, is TA-SegNet.
    """
    names = dict(summary)
    if "V1" in summary:
        names["Unet"] = summary["V1"]
    for version in ("V7", "V8"):
        if version in summary:
            names["TA-SegNet"] = summary[version]
            if summary[version]["classification"]["num_volumes"]:
                names["CovTANet"] = summary[version]
    return names


def _table_i(summary: Summary, note: str) -> Table:
    rows: list[Row] = []
    for name, cell in PAPER_TABLE_I.items():
        ours = _over_folds(summary.get(name), "dice")
        rows += [(name, "paper", (cell,)), (name, "ours", (ours,))]
    marks = {name: tuple("x" if on else "" for on in ticks) for name, ticks in TICKS.items()}
    return Table(
        title="Table I, ablation of TA-SegNet",
        columns=("Dice",),
        rows=tuple(rows),
        note=note,
        about=SWITCHES,
        details=marks,
        measured={name: _measured(network) for name, network in summary.items()},
    )


def _table_iv(names: Mapping[str, Any], note: str) -> Table:
    rows: list[Row] = []
    for name, cells in TABLE_IV.items():
        rows += [(name, "paper", cells), (name, "ours", _pairs(names.get(name)))]
    # The paper has no such row; without a value it is not shown.
    rows.append((LESION_SHARE, "ours", _pairs(names.get(LESION_SHARE))))
    measured = {name: _measured(network, "classification") for name, network in names.items()}
    f1_note = (
        "F1 is weighted by class; metrics.json holds the positive class's and the macro one too."
    )
    return Table(
        title="Table IV, diagnosis and severity",
        columns=tuple(f"{pair} {score}" for pair in PAIRS for score in SCORES),
        rows=tuple(rows),
        note=f"{note} {f1_note}",
        measured=measured,
    )


def _overlap(
    title: str,
    columns: Sequence[str],
    paper: Mapping[str, tuple[Cell, ...]],
    names: Mapping[str, Any],
    note: str,
) -> Table:
    """Return a table of segmentation metrics."""
    rows: list[Row] = []
    for name, cells in paper.items():
        ours = tuple(_over_folds(names.get(name), OVERLAP_COLUMNS[column]) for column in columns)
        rows += [(name, "paper", cells), (name, "ours", ours)]
    measured = {name: _measured(network) for name, network in names.items()}
    return Table(
        title=title, columns=tuple(columns), rows=tuple(rows), note=note, measured=measured
    )


def _measured(network: Any, part: str = "segmentation") -> str:
    """Return folds and number of test volumes of a network's values."""
    counts = {fold: metrics[part]["num_volumes"] for fold, metrics in network["folds"].items()}
    folds = [fold for fold, count in counts.items() if count]
    return f"fold {'+'.join(folds)}: {sum(counts.values())} volumes"


def _over_folds(network: Any, metric: str) -> Cell | None:
    """Return a segmentation metric over the folds; None for a network that was not trained."""
    if not network:
        return None
    parts = [fold["segmentation"] for fold in network["folds"].values()]
    return _percent(part.get("per_volume", {}).get(metric) for part in parts)


def _pairs(network: Any) -> tuple[Cell | None, ...]:
    """Return the cells of Table IV over the folds."""
    folds = []
    if network:
        folds = [fold["classification"] for fold in network["folds"].values()]
    return tuple(
        _percent(fold.get(pair, {}).get(score) for fold in folds)
        for pair in PAIRS.values()
        for score in SCORES.values()
    )


def _percent(values: Iterable[float | None]) -> Cell | None:
    """Return mean and standard deviation in percent, of one fold without the deviation."""
    percents = [100 * value for value in values if value is not None]
    if not percents:
        return None
    deviation = float(np.std(percents, ddof=1)) if len(percents) > 1 else None
    return float(np.mean(percents)), deviation

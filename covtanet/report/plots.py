"""Plots of a training and an evaluation as PNG.

Curves, confusion matrices, ROC, reliability, and the paper's tables as bars.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covtanet.report.tables import Cell, Table

INK, PAPER_COLOUR, OUR_COLOUR = "#22303c", "#b8c4ce", "#1f77b4"
PAIR_TITLES = {
    "normal_vs_mild": "normal / mild",
    "normal_vs_severe": "normal / severe",
    "mild_vs_severe": "mild / severe",
}


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    # Without the version of matplotlib equal plots are equal bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def curves(title: str, history: Sequence[Mapping[str, float]]) -> bytes:
    """Plot loss, validation and learned alphas by epoch; a line marks the epoch of the weights.

    Metrics that are NaN in every epoch are left out.
    """
    groups = _curve_groups(history)
    figure = Figure(figsize=(4 * len(groups), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    epochs = np.arange(1, len(history) + 1)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (label, names) in zip(panels, groups.items(), strict=True):
        for name in names:
            values = [epoch[name] for epoch in history]
            panel.plot(epochs, values, marker=".", label=name.removeprefix("alpha/"))
        panel.axvline(history[-1]["best_epoch"] + 1, color=INK, linewidth=0.8, linestyle=":")
        panel.set(xlabel="epoch", title=label)
        panel.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def _curve_groups(history: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Return the metrics of each panel; panels without a metric are left out."""
    names = [name for name in history[-1] if not all(np.isnan(epoch[name]) for epoch in history)]
    validation = [name for name in names if name.startswith("val_") and name != "val_loss"]
    groups = {
        "loss": [name for name in names if name.endswith("_loss")],
        "validation": validation,
        "alpha (Eq. 6)": [name for name in names if name.startswith("alpha/")],
    }
    return {label: members for label, members in groups.items() if members}


def confusion(title: str, classification: Mapping[str, Any]) -> bytes:
    """Plot the confusion matrices of the pairs of Table IV."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 3)
    for panel, (pair, name) in zip(panels, PAIR_TITLES.items(), strict=True):
        labels = name.split(" / ")
        panel.set(title=name, xlabel="predicted", ylabel="true")
        panel.set_xticks([0, 1], labels)
        panel.set_yticks([0, 1], labels)
        metrics = classification[pair]
        if metrics["num_volumes"]:
            cells = np.array([[metrics["tn"], metrics["fp"]], [metrics["fn"], metrics["tp"]]])
            _draw_cells(panel, cells)
    return _png(figure)


def _draw_cells(panel: Axes, cells: np.ndarray) -> None:
    panel.imshow(cells, cmap="Blues", vmin=0)
    for row, column in np.ndindex(2, 2):
        is_dark = cells[row, column] > cells.max() / 2
        colour = "white" if is_dark else INK
        text = str(cells[row, column])
        panel.text(column, row, text, ha="center", va="center", color=colour)


def roc(title: str, rows: Sequence[Mapping[str, Any]], classification: Mapping[str, Any]) -> bytes:
    """Plot the ROC curves of the pairs of Table IV that have an AUC."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color=PAPER_COLOUR, linewidth=0.8)
    for pair, name in PAIR_TITLES.items():
        metrics = classification[pair]
        if metrics.get("auc") is not None:
            _draw_roc(panel, name, rows, metrics)
    panel.set(title=title, xlabel="1 - specificity", ylabel="sensitivity")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, loc="lower right")
    return _png(figure)


def _draw_roc(
    panel: Axes, name: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]
) -> None:
    from sklearn.metrics import roc_curve

    negative, positive = name.split(" / ")
    column = "p_severe" if negative == "mild" else "p_infected"
    diagnosed = [row for row in rows if row["p_infected"] is not None and row[column] is not None]
    pair_rows = [row for row in diagnosed if row["grade"] in (negative, positive)]
    is_positive = [row["grade"] == positive for row in pair_rows]
    fpr, tpr, _ = roc_curve(is_positive, [row[column] for row in pair_rows])
    interval = f"{metrics['auc_low']:.3f}-{metrics['auc_high']:.3f}"
    panel.plot(fpr, tpr, label=f"{name}: AUC {metrics['auc']:.3f} ({interval})")


def reliability(title: str, classification: Mapping[str, Any]) -> bytes:
    """Plot the observed against the predicted share of infected and of severe volumes."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color=PAPER_COLOUR, linewidth=0.8)
    for name, label in (("diagnosis_calibration", "infected"), ("severity_calibration", "severe")):
        metrics = classification[name]
        if "brier" in metrics:
            text = f"{label}, Brier {metrics['brier']:.3f}"
            panel.plot(metrics["predicted"], metrics["observed"], marker="o", label=text)
    panel.set(title=title, xlabel="predicted probability", ylabel="observed share")
    if len(panel.lines) > 1:
        panel.legend(fontsize=8)
    return _png(figure)


def bars(table: Table) -> bytes:
    """Plot the metrics of a table as bars, the paper's and ours side by side."""
    names = list(dict.fromkeys(name for name, _, _ in table.rows))
    num_panels = len(table.columns)
    figure = Figure(figsize=(max(6, 0.8 * len(names) * num_panels**0.5), 2.6 * num_panels))
    panels = np.atleast_1d(figure.subplots(num_panels, 1, sharex=True))
    for index, (panel, column) in enumerate(zip(panels, table.columns, strict=True)):
        for whose, offset, colour in (("paper", -0.2, PAPER_COLOUR), ("ours", 0.2, OUR_COLOUR)):
            cells = {name: cells[index] for name, side, cells in table.rows if side == whose}
            for position, name in enumerate(names):
                _draw_bar(panel, position + offset, cells.get(name), colour, whose)
        panel.set(ylabel=f"{column} (%)", ylim=(0, 100))
        handles, labels = panel.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        panel.legend(unique.values(), unique.keys(), fontsize=7)
    panels[-1].set_xticks(range(len(names)), names, rotation=30, ha="right")
    panels[0].set_title(table.title, fontsize=11)
    # The picture itself names the data set of our values.
    figure.supxlabel(table.note, fontsize=7, wrap=True)
    figure.tight_layout()
    return _png(figure)


def _draw_bar(panel: Axes, x: float, cell: Cell | None, colour: str, label: str) -> None:
    if cell is not None:
        mean, deviation = cell
        panel.bar(x, mean, 0.38, yerr=deviation or 0, color=colour, label=label)

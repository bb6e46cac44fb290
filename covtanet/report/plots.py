"""Plots of a training and an evaluation as PNG: curves, confusion, ROC, reliability, and the tables as bars."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from covtanet.report.tables import Table

INK, PAPER_COLOUR, OUR_COLOUR = "#22303c", "#b8c4ce", "#1f77b4"
PAIR_TITLES = {
    "normal_vs_mild": "normal / mild",
    "normal_vs_severe": "normal / severe",
    "mild_vs_severe": "mild / severe",
}


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def curves(title: str, history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss, validation and learned alphas by epoch, where there are any; the epoch whose weights count is marked."""
    known = [name for name in history[-1] if not all(np.isnan(epoch[name]) for epoch in history)]
    groups = {
        "loss": [name for name in known if name.endswith("_loss")],
        "validation": [name for name in known if name.startswith("val_") and name != "val_loss"],
        "alpha (Eq. 6)": [name for name in known if name.startswith("alpha/")],
    }
    groups = {label: names for label, names in groups.items() if names}
    figure = Figure(figsize=(4 * len(groups), 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    epochs = np.arange(1, len(history) + 1)
    for panel, (label, names) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for name in names:
            panel.plot(
                epochs,
                [epoch[name] for epoch in history],
                marker=".",
                label=name.removeprefix("alpha/"),
            )
        panel.axvline(history[-1]["best_epoch"] + 1, color=INK, linewidth=0.8, linestyle=":")
        panel.set(xlabel="epoch", title=label)
        panel.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def confusion(title: str, classification: Mapping[str, Any]) -> bytes:
    """Confusion matrices of the pairs of Table IV."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for panel, (pair, name) in zip(figure.subplots(1, 3), PAIR_TITLES.items(), strict=True):
        negative, positive = name.split(" / ")
        found = classification[pair]
        panel.set(title=name, xlabel="predicted", ylabel="true")
        panel.set_xticks([0, 1], [negative, positive])
        panel.set_yticks([0, 1], [negative, positive])
        if not found["num_volumes"]:
            continue
        cells = np.array([[found["tn"], found["fp"]], [found["fn"], found["tp"]]])
        panel.imshow(cells, cmap="Blues", vmin=0)
        for row, column in np.ndindex(2, 2):
            is_dark = cells[row, column] > cells.max() / 2
            panel.text(
                column,
                row,
                str(cells[row, column]),
                ha="center",
                va="center",
                color="white" if is_dark else INK,
            )
    return _png(figure)


def roc(title: str, rows: Sequence[Mapping[str, Any]], classification: Mapping[str, Any]) -> bytes:
    """ROC curves of the pairs of Table IV."""
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color=PAPER_COLOUR, linewidth=0.8)
    for pair, name in PAIR_TITLES.items():
        negative, positive = name.split(" / ")
        found = classification[pair]
        if found.get("auc") is None:
            continue
        chosen = [
            row
            for row in rows
            if row["grade"] in (negative, positive) and row["p_infected"] is not None
        ]
        column = "p_severe" if negative == "mild" else "p_infected"
        fpr, tpr, _ = roc_curve(
            [row["grade"] == positive for row in chosen], [row[column] for row in chosen]
        )
        label = f"{name}: AUC {found['auc']:.3f} ({found['auc_low']:.3f}-{found['auc_high']:.3f})"
        panel.plot(fpr, tpr, label=label)
    panel.set(title=title, xlabel="1 - specificity", ylabel="sensitivity")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, loc="lower right")
    return _png(figure)


def reliability(title: str, classification: Mapping[str, Any]) -> bytes:
    """Observed against predicted share of the infected and of the severe."""
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], color=PAPER_COLOUR, linewidth=0.8)
    for name, label in (("diagnosis_calibration", "infected"), ("severity_calibration", "severe")):
        found = classification[name]
        if "brier" in found:
            panel.plot(
                found["predicted"],
                found["observed"],
                marker="o",
                label=f"{label}, Brier {found['brier']:.3f}",
            )
    panel.set(title=title, xlabel="predicted probability", ylabel="observed share")
    if len(panel.lines) > 1:
        panel.legend(fontsize=8)
    return _png(figure)


def bars(table: Table) -> bytes:
    """A table's figures as bars, the paper's and ours side by side."""
    names = list(dict.fromkeys(name for name, _, _ in table.rows))
    figure = Figure(
        figsize=(max(6, 0.8 * len(names) * len(table.columns) ** 0.5), 2.6 * len(table.columns))
    )
    panels = np.atleast_1d(figure.subplots(len(table.columns), 1, sharex=True))
    for index, (panel, column) in enumerate(zip(panels, table.columns, strict=True)):
        for whose, offset, colour in (("paper", -0.2, PAPER_COLOUR), ("ours", 0.2, OUR_COLOUR)):
            found = {name: cells[index] for name, side, cells in table.rows if side == whose}
            for position, name in enumerate(names):
                if (cell := found.get(name)) is not None:
                    panel.bar(
                        position + offset,
                        cell[0],
                        0.38,
                        yerr=cell[1] or 0,
                        color=colour,
                        label=whose,
                    )
        panel.set(ylabel=f"{column} (%)", ylim=(0, 100))
        handles, labels = panel.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        panel.legend(unique.values(), unique.keys(), fontsize=7)
    panels[-1].set_xticks(range(len(names)), names, rotation=30, ha="right")
    panels[0].set_title(table.title, fontsize=11)
    figure.supxlabel(
        table.note, fontsize=7, wrap=True
    )  # what ours was measured on goes with the picture
    figure.tight_layout()
    return _png(figure)

"""Tables I to IV of the paper in its own rows and columns, its figures and ours one under the other.

All of the paper's figures are from its Tables I-IV, in percent, mean and standard deviation.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from covtanet.model import table_i
from covtanet.model.table_i import PRETRAINED_ROW

Cell = tuple[float, float | None]
Figures = Mapping[str, Any]

OVERLAP_COLUMNS = {"Sensitivity": "sensitivity", "Precision": "precision", "Specificity": "specificity",
                   "Dice": "dice", "IoU": "iou"}  # fmt: skip
TABLE_I = {
    "V1": (50.5, 0.26), "V2": (52.4, 0.17), "V3": (54.9, 0.14), "V4": (54.6, 0.14),
    "V5": (53.4, 0.19), "V6": (57.1, 0.33), "V7": (60.2, 0.26), "V8": (62.3, 0.18),
}  # fmt: skip
SWITCHES = ("EfficientNet", "Encoder TAU", "Decoder TAU", "Encoder in fusion", "Decoder in fusion")
TICKS = {name: (name == PRETRAINED_ROW, *astuple(row)) for name, row in table_i.SWITCHES.items()}
TABLE_II_COLUMNS = ("Sensitivity", "Precision", "Dice", "IoU")
TABLE_II = {
    "FCN": ((78.8, 0.23), (58.9, 0.16), (35.6, 0.36), (29.3, 0.45)),
    "Unet": ((94.3, 0.34), (74.4, 0.32), (50.5, 0.26), (40.3, 0.23)),
    "Vnet": ((84.5, 0.42), (64.6, 0.54), (40.2, 0.33), (36.4, 0.26)),
    "Unet++": ((78.1, 0.15), (65.1, 0.25), (37.2, 0.27), (33.3, 0.32)),
    "CPF-Net": ((82.4, 0.25), (71.3, 0.29), (48.9, 0.21), (37.6, 0.38)),
    "COPLE-Net": ((85.5, 0.18), (73.1, 0.20), (51.1, 0.21), (41.2, 0.38)),
    "Mini-SegNet": ((81.5, 0.25), (69.1, 0.19), (43.7, 0.23), (35.2, 0.38)),
    "Inf-Net": ((92.8, 0.27), (76.9, 0.34), (51.8, 0.31), (41.6, 0.27)),
    "TA-SegNet": ((99.6, 0.09), (84.8, 0.26), (62.3, 0.18), (51.7, 0.29)),
}
TABLE_III_COLUMNS = ("Sensitivity", "Specificity", "Dice", "IoU")
TABLE_III = {
    "Unet": ((75.9, 0.34), (88.9, 0.12), (79.3, 0.26), (74.9, 0.18)),
    "MultiResUnet": ((77.2, 0.33), (90.3, 0.24), (82.7, 0.28), (77.4, 0.15)),
    "Attention-Unet": ((81.1, 0.29), (92.2, 0.11), (85.1, 0.14), (79.6, 0.28)),
    "CPF-Net": ((78.9, 0.27), (91.7, 0.14), (84.4, 0.25), (79.3, 0.25)),
    "Gated-Unet": ((81.4, 0.24), (92.5, 0.19), (85.6, 0.19), (80.2, 0.16)),
    "Inf-Net": ((82.7, 0.26), (94.8, 0.21), (86.9, 0.34), (81.1, 0.18)),
    "TA-SegNet": ((88.5, 0.22), (98.9, 0.14), (90.2, 0.17), (86.4, 0.19)),
}
PAIRS = {
    "Normal vs. Mild": "normal_vs_mild",
    "Normal vs. Severe": "normal_vs_severe",
    "Mild vs. Severe": "mild_vs_severe",
}
SCORES = {"Sen.": "sensitivity", "Spec.": "specificity", "Acc.": "accuracy", "F1": "f1_weighted"}
TABLE_IV = {
    "VGG-19": ((54.4, 0.37), (63.4, 0.28), (58.4, 0.32), (58.6, 0.33), (63.4, 0.32), (70.8, 0.37), (65.9, 0.28),
               (66.9, 0.39), (62.7, 0.25), (65.5, 0.23), (61.9, 0.25), (64.1, 0.28)),
    "ResNet-50": ((61.1, 0.29), (65.7, 0.33), (62.5, 0.44), (63.3, 0.37), (66.5, 0.26), (69.3, 0.31), (69.1, 0.17),
                  (67.8, 0.33), (61.1, 0.36), (63.8, 0.29), (64.8, 0.34), (62.4, 0.37)),
    "Xception": ((56.8, 0.38), (57.9, 0.41), (59.9, 0.27), (57.3, 0.43), (64.8, 0.19), (67.2, 0.26), (66.7, 0.21),
                 (65.9, 0.25), (62.9, 0.33), (65.1, 0.32), (63.1, 0.22), (63.9, 0.34)),
    "DenseNet121": ((59.7, 0.27), (64.6, 0.21), (61.1, 0.39), (62.1, 0.28), (65.1, 0.23), (70.1, 0.19), (67.8, 0.29),
                    (67.5, 0.25), (60.2, 0.28), (64.4, 0.21), (60.6, 0.26), (62.2, 0.27)),
    "InceptionV3": ((60.4, 0.31), (62.1, 0.38), (59.3, 0.23), (61.2, 0.35), (66.6, 0.28), (69.8, 0.24), (66.2, 0.32),
                    (68.2, 0.31), (62.8, 0.29), (67.9, 0.35), (61.4, 0.19), (65.3, 0.33)),
    "CovTANet": ((83.8, 0.25), (90.3, 0.27), (85.2, 0.19), (86.9, 0.22), (93.9, 0.13), (96.6, 0.11), (95.8, 0.17),
                 (94.2, 0.21), (90.9, 0.16), (93.4, 0.23), (91.7, 0.19), (92.1, 0.11)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with two lines per network: the paper's and ours. A cell is null where there is none.

    about, details: further columns, and their text for each network. measured: folds and volumes of ours.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell | None, ...]], ...]
    note: str
    about: tuple[str, ...] = ()
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)

    def _ours(self, name: str, whose: str) -> str:
        return (
            f"ours, {self.measured[name]}" if whose == "ours" and name in self.measured else whose
        )

    def as_markdown(self) -> str:
        """The table for people."""
        columns = (*self.about, *self.columns)
        lines = [
            f"### {self.title}",
            "",
            f"| Network | | {' | '.join(columns)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        for name, whose, cells in self.rows:
            if any(cells):  # a network that we have not trained has a line of the paper's alone
                texts = (*self.details.get(name, ()), *(_text(cell) for cell in cells))
                lines.append(f"| {name} | {self._ours(name, whose)} | {' | '.join(texts)} |")
        return "\n".join([*lines, "", self.note, ""])

    def as_csv(self) -> str:
        """The table for programs: one line per figure, null as an empty field."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["table", "network", "whose", "column", "mean_percent", "sd_percent", "measured_on"]
        )
        for name, whose, cells in self.rows:
            for column, cell in zip(self.columns, cells, strict=True):
                mean, sd = cell or ("", "")
                measured = self.measured.get(name, "") if whose == "ours" else ""
                writer.writerow(
                    [self.title, name, whose, column, mean, "" if sd is None else sd, measured]
                )
        return out.getvalue()


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell[0]:.1f}" + ("" if cell[1] is None else f"±{cell[1]:.2f}")


def paper_tables(summary: Figures, measured_on: str, *, is_second_data_set: bool) -> list[Table]:
    """The tables that a summary (``figures.summarise``) has anything for.

    is_second_data_set: Table III instead of Tables I, II and IV. Ours are means over the folds' means per volume;
    Choice: per volume, since the paper's own figures cannot be pooled ones, and F1 weighted by class.
    """
    names = ours_by_name(summary)
    note = f"Ours: {measured_on}; mean over test volumes of the prepared slices, ± standard deviation over folds."
    if is_second_data_set:
        return [_overlap("Table III", TABLE_III_COLUMNS, TABLE_III, names, note)]
    table_i = Table(
        title="Table I, ablation of TA-SegNet",
        columns=("Dice",),
        rows=tuple(
            row
            for name, cell in TABLE_I.items()
            for row in (
                (name, "paper", (cell,)),
                (name, "ours", (_over_folds(summary.get(name), "dice"),)),
            )
        ),
        note=note,
        about=SWITCHES,
        details={name: tuple("x" if on else "" for on in ticks) for name, ticks in TICKS.items()},
        measured={name: _measured(network) for name, network in summary.items()},
    )
    table_iv = Table(
        title="Table IV, diagnosis and severity",
        columns=tuple(f"{pair} {score}" for pair in PAIRS for score in SCORES),
        rows=tuple(
            row
            for name, cells in TABLE_IV.items()
            for row in ((name, "paper", cells), (name, "ours", _pairs(names.get(name))))
        ),
        note=f"{note} F1 is weighted by class; metrics.json holds the positive class's and the macro one too.",
        measured={name: _measured(network, "classification") for name, network in names.items()},
    )
    return [
        table_i,
        _overlap("Table II, lesion segmentation", TABLE_II_COLUMNS, TABLE_II, names, note),
        table_iv,
    ]


def ours_by_name(summary: Figures) -> dict[str, Any]:
    """Our networks under the names of Tables II to IV: V1 is the Unet, the fullest TA-SegNet trained is TA-SegNet."""
    names = {name: summary[name] for name in summary}
    if "V1" in summary:
        names["Unet"] = summary["V1"]
    for version in ("V7", "V8"):
        if version in summary:
            names["TA-SegNet"] = summary[version]
            if summary[version]["classification"]["num_volumes"]:
                names["CovTANet"] = summary[version]
    return names


def _overlap(
    title: str,
    columns: Sequence[str],
    paper: Mapping[str, tuple[Cell, ...]],
    names: Mapping[str, Any],
    note: str,
) -> Table:
    rows: list[tuple[str, str, tuple[Cell | None, ...]]] = []
    for name, cells in paper.items():
        ours = tuple(_over_folds(names.get(name), OVERLAP_COLUMNS[column]) for column in columns)
        rows += [(name, "paper", cells), (name, "ours", ours)]
    measured = {name: _measured(network) for name, network in names.items()}
    return Table(
        title=title, columns=tuple(columns), rows=tuple(rows), note=note, measured=measured
    )


def _measured(network: Any, part: str = "segmentation") -> str:
    """Folds and number of test volumes behind a network's line."""
    counts = {fold: figures[part]["num_volumes"] for fold, figures in network["folds"].items()}
    known = [fold for fold, count in counts.items() if count]
    return f"fold {'+'.join(known)}: {sum(counts.values())} volumes"


def _over_folds(network: Any, figure: str) -> Cell | None:
    if not network:
        return None
    folds = network["folds"].values()
    return _percent([fold["segmentation"].get("per_volume", {}).get(figure) for fold in folds])


def _pairs(network: Any) -> tuple[Cell | None, ...]:
    if not network:
        return (None,) * (len(PAIRS) * len(SCORES))
    folds = [fold["classification"] for fold in network["folds"].values()]
    return tuple(
        _percent([fold.get(pair, {}).get(score) for fold in folds])
        for pair in PAIRS.values()
        for score in SCORES.values()
    )


def _percent(values: Sequence[float | None]) -> Cell | None:
    known = [100 * value for value in values if value is not None]
    if not known:
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None

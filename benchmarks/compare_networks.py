"""Print the tables of a comparison of segmenters in Markdown.

python -m benchmarks.compare_networks OUT [OUT ..] [--reference V8]

OUT: folders with results.jsonl of compare_gpu.py. Networks are compared with equal steps only: a
table for each number of steps. Intervals are 95 %, bootstrap over patients, and differences are
paired over patients.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare_plan import FOLDS, FOUR_FLIPS, ONE_VIEW, RATE_JUDGE, chosen_rate, rate_dice
from covtanet.evaluation.overlap import (
    Counts,
    by_lesion_size,
    count_rows,
    overlap,
    overlap_difference,
)

RESULTS = "results.jsonl"
LESION_PX = (0, 50, 128, 512, 65536)
VOLUME = "per_volume"
SLICE = "per_slice"
# Patients on which no rate was chosen: all but those of the judge's fold.
CLEAN = tuple(name for fold in FOLDS if RATE_JUDGE not in fold for name in fold)
ALL = tuple(name for fold in FOLDS for name in fold)

Row = dict[str, Any]


@dataclass
class Result:
    """Trainings of one network with the same number of steps and the same seed."""

    network: str
    num_steps: int
    seed: int
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the network, with the number of a second seed."""
        return f"{self.network}, seed {self.seed}" if self.seed else self.network

    def counts(self, view: str, patients: Sequence[str] = ALL) -> dict[str, Counts]:
        """Return TP, FP and FN of every slice by patient."""
        rows: dict[str, Any] = {}
        for row in self.rows:
            rows |= {name: views[view] for name, views in row["counts"].items()}
        return count_rows({name: rows[name] for name in patients if name in rows})

    def has(self, patients: Iterable[str]) -> bool:
        """Whether all these patients were tested."""
        return set(patients) <= set(self.counts(FOUR_FLIPS))


def read(folders: Sequence[Path]) -> list[Row]:
    """Return the results of several runs; of two with the same label the later one counts."""
    rows: dict[str, Row] = {}
    for folder in folders:
        for line in (folder / RESULTS).read_text().splitlines():
            row = json.loads(line)
            is_better = row["status"] == "done" or row["label"] not in rows
            if is_better:
                rows[row["label"]] = row
    return list(rows.values())


def results_of(rows: Iterable[Row]) -> dict[int, list[Result]]:
    """Return the finished trainings by number of steps, in the order in which they ended."""
    results: dict[tuple[int, str, int], Result] = {}
    for row in rows:
        if row["kind"] == "training" and row["status"] == "done":
            key = (row["num_steps"], row["network"], row["seed"])
            empty = Result(network=key[1], num_steps=key[0], seed=key[2])
            results.setdefault(key, empty).rows.append(row)
    by_steps: dict[int, list[Result]] = defaultdict(list)
    for key in sorted(results, key=lambda key: -key[0]):
        by_steps[key[0]].append(results[key])
    return by_steps


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, with an empty line behind it."""
    rule = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)] + [""]


def number(value: float | None, sign: str = "") -> str:
    """Return a Dice with three decimals, or a dash."""
    return "-" if value is None else f"{value:{sign}.3f}"


def interval(dice: dict[str, float | None], sign: str = "") -> str:
    """Return a Dice with its interval."""
    bounds = f"{number(dice['low'], sign)} to {number(dice['high'], sign)}"
    return f"{number(dice['dice'], sign)} ({bounds})"


def rate_table(rows: Sequence[Row]) -> list[str]:
    """Return the choice of the rates: Dice per slice of the judging patient at each rate."""
    dice: dict[str, dict[float, str]] = {}
    for row in rows:
        if row["kind"] == "rate":
            is_done = row["status"] == "done"
            cell = number(rate_dice(row)) if is_done else row["status"]
            dice.setdefault(row["network"], {})[row["rate"]] = f"{row['rate']:g}: {cell}"
    lines = []
    for network, cells in dice.items():
        chosen = chosen_rate(rows, network)
        text = "-" if chosen is None else f"{chosen:g}"
        lines.append([network, ", ".join(cells[rate] for rate in sorted(cells)), text])
    return table(["network", f"rate: Dice per slice on {RATE_JUDGE}", "chosen"], lines)


def dice_table(results: Sequence[Result], patients: Sequence[str]) -> list[str]:
    """Return Dice per volume and per slice of the networks that have these patients, best first."""
    lines = []
    complete = [result for result in results if result.has(patients)]
    by_dice = {
        result.name: (result, overlap(result.counts(FOUR_FLIPS, patients))) for result in complete
    }
    for name in sorted(by_dice, key=lambda name: -(by_dice[name][1][VOLUME]["dice"] or 0.0)):
        result, four = by_dice[name]
        single = overlap(result.counts(ONE_VIEW, patients))
        lines.append(
            [
                name,
                interval(four[VOLUME]),
                interval(four[SLICE]),
                number(four["precision"]),
                number(four["sensitivity"]),
                number(single[VOLUME]["dice"]),
                number(single[SLICE]["dice"]),
            ]
        )
    head = ["network", "Dice per volume", "per slice", "precision", "sensitivity"]
    return table([*head, "one view: volume", "slice"], lines)


def difference_table(
    results: Sequence[Result], reference: str, patients: Sequence[str]
) -> list[str]:
    """Return the paired differences, reference minus each other network, over patients."""
    complete = [result for result in results if result.has(patients)]
    first = next((result for result in complete if result.name == reference), None)
    if first is None:
        return []
    lines = []
    for result in complete:
        if result is not first:
            ours = first.counts(FOUR_FLIPS, patients)
            difference = overlap_difference(ours, result.counts(FOUR_FLIPS, patients))
            texts = [interval(difference[name], "+") for name in (VOLUME, SLICE)]
            lines.append([f"{reference} minus {result.name}", *texts])
    return table(["paired difference", "Dice per volume", "per slice"], lines)


def patient_table(results: Sequence[Result]) -> list[str]:
    """Return the Dice of each patient, per volume and per slice."""
    lines = []
    for result in results:
        tested = result.counts(FOUR_FLIPS)
        by_patient = overlap(tested)["by_patient"]
        cells = [
            f"{number(by_patient[name][VOLUME])} / {number(by_patient[name][SLICE])}"
            if name in tested
            else "-"
            for name in ALL
        ]
        lines.append([result.name, *cells])
    return table(["volume / slice", *(name.rpartition("-")[2] for name in ALL)], lines)


def size_table(results: Sequence[Result], patients: Sequence[str]) -> list[str]:
    """Return the mean Dice of slices by the size of their true lesion."""
    lines = []
    head = ["true lesion of a slice, pixels"]
    for result in results:
        if result.has(patients):
            sizes = by_lesion_size(result.counts(FOUR_FLIPS, patients), LESION_PX)
            lines.append([result.name, *(number(row["dice"]) for row in sizes)])
            head = ["network", *(f"{row['above_px']} to {row['to_px']}" for row in sizes)]
    return table(head, lines)


def course_table(results: Sequence[Result]) -> list[str]:
    """Return rate, loss and time of each network; times are those of a shared card."""
    lines = []
    for result in results:
        losses = [f"{row['losses'][-1]:.3f}" for row in result.rows if row["losses"]]
        steps_ms = [f"{1000 * row['step_s']:.0f}" for row in result.rows]
        memory = max(row["peak_gib"] for row in result.rows)
        folds = ", ".join(str(row["fold"]) for row in result.rows)
        rate = f"{result.rows[0]['rate']:g}"
        texts = [", ".join(losses), ", ".join(steps_ms), f"{memory:.1f}"]
        lines.append([result.name, folds, rate, *texts])
    head = ["network", "folds", "rate", "last loss", "ms per step, shared card", "GiB"]
    return table(head, lines)


def report(rows: Sequence[Row], reference: str) -> list[str]:
    """Return all tables, each number of steps by itself."""
    lines = ["## Learning rates", "", *rate_table(rows)]
    for num_steps, results in results_of(rows).items():
        lines += [f"## {num_steps} steps", ""]
        groups = {"All six patients": ALL, f"Without the fold of {RATE_JUDGE}": CLEAN}
        groups |= {f"Fold {fold}": patients for fold, patients in enumerate(FOLDS)}
        for title, patients in groups.items():
            if any(result.has(patients) for result in results):
                lines += [f"### {title}", "", *dice_table(results, patients)]
                lines += difference_table(results, reference, patients)
                if patients is ALL:
                    lines += size_table(results, patients)
        lines += ["### Each patient", "", *patient_table(results)]
        lines += ["### Trainings", "", *course_table(results)]
    lines += ["## Not finished", ""]
    for row in rows:
        if row["status"] != "done":
            lines.append(f"- {row['label']}: {row['status']} {row.get('message', '')}")
    return lines


def main() -> int:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folders", type=Path, nargs="+")
    options.add_argument("--reference", default="V8", help="network that the others are paired to")
    arguments = options.parse_args()
    print("\n".join(report(read(arguments.folders), arguments.reference)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

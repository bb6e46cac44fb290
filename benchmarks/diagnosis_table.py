"""Print Table IV from the files of diagnosis_gpu.py, by the metrics of `covtanet evaluate`.

python -m benchmarks.diagnosis_table --rows DIR --out DIR

Writes what an evaluation writes: metrics.json, tables.md, a CSV and a plot per table, rows.parquet.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covtanet.evaluation.output import make_output
from covtanet.evaluation.rows import COUNTS

MEASURED_ON = "mosmed-mid, one middle slice of each study, test parts of five folds by patient"


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return all lines of the files of one run."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("rows-*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def to_rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tested studies as rows of an evaluation; no pixel was counted."""
    names = ("network", "fold", "grade", "p_infected", "p_severe")
    empty = {"source_digest": None, "slice": [0], **dict.fromkeys(COUNTS)}
    return [
        {**empty, "volume": line["study"], **{name: line[name] for name in names}}
        for line in lines
        if line["kind"] == "row"
    ]


def describe(lines: Sequence[dict[str, Any]]) -> str:
    """Return choices and course of the trainings, one line per network."""
    texts = []
    for line in lines:
        if line["kind"] == "choice":
            trainings = [
                other
                for other in lines
                if other["kind"] == "training" and other["network"] == line["network"]
            ]
            epochs = sorted({training["num_epochs"] for training in trainings})
            seconds = sum(training["seconds"] for training in trainings)
            texts.append(
                f"{line['network']}: chosen {line['chosen']} of {line['auc']}, epochs {epochs}, "
                f"{len(trainings)} folds in {seconds:.0f} s"
            )
    return "\n".join(texts)


def main() -> int:
    """Print the tables and write the files."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    lines = read_lines(arguments.rows)
    output = make_output(
        to_rows(lines), {"benchmark": "diagnosis_gpu"}, MEASURED_ON, is_second_data_set=False
    )
    for path, data in output.files.items():
        (arguments.out / path).parent.mkdir(parents=True, exist_ok=True)
        (arguments.out / path).write_bytes(data)
    print(output.text)
    print(describe(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure, print a table, and keep each theme's results: ``make bench``.

python -m benchmarks [--part NAME ...]
"""

import argparse
import sys

from benchmarks import (
    decode,
    endurance,
    job,
    load,
    network,
    pacs,
    real_size,
    sandbox,
    scale,
    serving,
    throughput,
    training,
    year,
)
from benchmarks.measure import WORK, Result, keep, table

PARTS = {
    "network": network.measure,
    "decode": decode.measure,
    "sandbox": sandbox.measure,
    "job": job.measure,
    "real_size": real_size.measure,
    "endurance": endurance.measure,
    "pacs": pacs.measure,
    "scale": scale.measure_trivial,
    "million": scale.measure_synthetic,
    "year": year.measure,
    "serving": serving.measure,
    "load": load.measure,
    "training": training.measure,
    "throughput": throughput.measure,
}
# A theme is kept as a file once all its parts were measured.
THEMES = {
    "screening": ("network", "decode", "job"),
    "real_size": ("real_size",),
    "hostile": ("sandbox",),
    "endurance": ("endurance",),
    "pacs": ("pacs",),
    "scale": ("scale",),
    "million": ("million", "year"),
    "serving": ("serving",),
    "load": ("load",),
    "training": ("training",),
    "throughput": ("throughput",),
}


def main() -> int:
    """Measure the parts asked for, all without ``--part``."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--part", choices=PARTS, action="append")
    chosen = options.parse_args().part or list(PARTS)
    WORK.mkdir(exist_ok=True)
    by_part: dict[str, list[Result]] = {}
    for part in chosen:
        print(f"{part} ...", flush=True)
        by_part[part] = PARTS[part]()
    print()
    print("\n".join(table(row for results in by_part.values() for row in results)))
    for theme, parts in THEMES.items():
        if set(parts) <= set(by_part):
            keep(theme, [row for part in parts for row in by_part[part]])
    return 0


if __name__ == "__main__":
    sys.exit(main())

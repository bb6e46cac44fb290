"""Measure works in turns, and print and keep the results as Markdown tables.

Machines differ and are noisy, so no absolute time is a result: a result is a ratio of two
measurements that took turns in one run.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from covtanet.machine import num_cores

ROOT = Path(__file__).resolve().parents[1]
# Archives, models and runs; ``make clean`` removes it.
WORK = ROOT / ".bench"
CORES = num_cores()
ROUNDS = 5
TABLE_HEAD = ("| | what | measured | wanted |", "|---|---|---|---|")


@dataclass(frozen=True)
class Result:
    """One line of the table. bound: the value wanted, empty if there is none."""

    part: str
    name: str
    value: str
    bound: str = ""


def seconds(work: Callable[[], object]) -> float:
    """Run a work once; return its wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def side_by_side(
    works: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Return the median seconds of each work.

    The works take turns, so that another load on the machine slows all of them alike. A first turn
    does not count: caches are cold and libraries load.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(spent[1:]) for name, spent in times.items()}


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"  {text}", flush=True)


def table(results: Iterable[Result]) -> list[str]:
    """Return the lines of a Markdown table."""
    rows = [f"| {row.part} | {row.name} | {row.value} | {row.bound} |" for row in results]
    return [*TABLE_HEAD, *rows]


def result_file(theme: str) -> Path:
    """Return the path of a theme's results on this machine in this month."""
    hardware = f"{CORES}cpu"
    if torch.cuda.is_available():
        hardware += "-gpu"
    return ROOT / "benchmarks" / f"{theme}_{hardware}_{datetime.now(UTC):%Y%m}.md"


def keep(theme: str, results: Iterable[Result]) -> None:
    """Write a theme's results under benchmarks/, named after the machine and the month."""
    target = result_file(theme)
    month = f"{datetime.now(UTC):%Y-%m}"
    title = f"# {theme.capitalize()}, {CORES} cores, {platform.machine()}, {month}"
    lines = [title, "", "`make bench`; ratios within one run.", "", *table(results), ""]
    target.write_text("\n".join(lines))
    print(f"kept in {target.relative_to(ROOT)}")

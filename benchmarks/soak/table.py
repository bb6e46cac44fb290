"""The nights of a soak as a Markdown table."""

import platform
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.measure import result_file
from benchmarks.soak.night import Night

HEAD = ["night", "series", "disturbance", "starts", "codes", "rows", "failed", "s", "ledger"]
KIND_HEAD = ["disturbance", "nights", "starts, mean", "starts, most", "failed series", "wrong"]


def line(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def keep_nights(nights: Sequence[Night], hours: float, seed: int) -> None:
    """Write totals, a table by disturbance and a table of all nights under benchmarks/."""
    target = result_file("soak")
    failed = sum((night.failed for night in nights), Counter[str]())
    wrong = [night for night in nights if night.faults]
    lines = [
        f"# Soak, {platform.machine()}, {nights[0].num_present} to "
        f"{max(night.num_present for night in nights)} series",
        "",
        f"`make soak HOURS={hours:g}`, seed {seed}: {len(nights)} nights, "
        f"{sum(len(night.codes) for night in nights)} starts, "
        f"{sum(night.num_rows for night in nights)} rows, {failed.total()} of them failed and "
        f"due again the next night, {len(wrong)} nights with a wrong ledger.",
        "",
        "The codes are the exit codes of a night's starts, -9 for a kill. A disturbance is missed "
        "if the job had ended before it came. Ray has one node: a start whose node is killed ends "
        "with code 1. Code 4: all series of the night were rejected; less is not too many here "
        "(`--max-rejected 1 --max-failed 1`).",
        "",
        *_by_kind(nights),
        "",
        line(HEAD),
        line("---" for _ in HEAD),
        *(line(night.cells()) for night in nights),
        *(f"\n{night.date}: {fault}" for night in wrong for fault in night.faults),
        "",
    ]
    target.write_text("\n".join(lines))
    print(f"kept in {target.name}")


def _by_kind(nights: Sequence[Night]) -> list[str]:
    kinds = sorted({kind for night in nights for kind in night.disturbances or ("none",)})
    lines = [line(KIND_HEAD), line("---" for _ in KIND_HEAD)]
    for kind in kinds:
        chosen = [night for night in nights if kind in (night.disturbances or ("none",))]
        starts = [len(night.codes) for night in chosen]
        cells = (
            kind,
            len(chosen),
            f"{sum(starts) / len(starts):.1f}",
            max(starts),
            sum(night.failed.total() for night in chosen),
            sum(bool(night.faults) for night in chosen),
        )
        lines.append(line(map(str, cells)))
    return lines

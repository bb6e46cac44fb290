"""Overlap beyond the paper's tables as Markdown: intervals, pixel accuracy, lesion sizes."""

from collections.abc import Iterator, Mapping
from typing import Any

from covtanet.evaluation.overlap import MEANS

Metrics = Mapping[str, Any]

INTERVALS_HEAD = (
    "### Dice with 95 % intervals",
    "",
    "| network | lung mask | volumes | patients | per slice | per slice with lesion | per volume "
    "| pooled | pixel accuracy |",
    "|---|---|---|---|---|---|---|---|---|",
)
INTERVALS_NOTE = (
    "Intervals by bootstrap over patients. Per slice: mean over slices with a lesion in truth or "
    "prediction. Pixel accuracy: mean over volumes."
)
SHARE_HEAD = (
    "### Dice by lesion size",
    "",
    "| network | lesion of the slice | slices | Dice |",
    "|---|---|---|---|",
)
PX_HEAD = (
    "### Dice by lesion size in pixels of the source",
    "",
    "| network | lung mask | lesion pixels | slices | Dice |",
    "|---|---|---|---|---|",
)


def overlap_text(summary: Mapping[str, Any]) -> str:
    """Return the tables of a summary (``metrics.summarise``); networks without masks are left out.

    Empty if no network marks lesions.
    """
    networks = {name: network["segmentation"] for name, network in summary.items()}
    masked = {name: metrics for name, metrics in networks.items() if metrics["num_volumes"]}
    if not masked:
        return ""
    lines = [*INTERVALS_HEAD]
    for name, metrics in masked.items():
        lines += [_interval_row(name, mask, part, metrics) for mask, part in _by_mask(metrics)]
    lines += ["", INTERVALS_NOTE, *_notes(masked), "", *SHARE_HEAD]
    for name, metrics in masked.items():
        lines += _share_rows(name, metrics)
    lines += ["", *PX_HEAD]
    for name, metrics in masked.items():
        for mask, part in _by_mask(metrics):
            lines += _px_rows(name, mask, part)
    return "\n".join([*lines, ""])


def _by_mask(metrics: Metrics) -> Iterator[tuple[str, Metrics]]:
    """Yield the metrics with the lung mask of screening, and without it."""
    if "without_lung_mask" not in metrics:
        yield "none", metrics
        return
    yield "as in screening", metrics
    yield "none", metrics["without_lung_mask"]


def _interval_row(name: str, mask: str, part: Metrics, metrics: Metrics) -> str:
    cells = [_interval(part["dice_intervals"][mean]) for mean in MEANS]
    counts = (str(metrics["num_volumes"]), str(metrics["num_patients"]))
    accuracy = _percent(part["per_volume"]["accuracy"], 2)
    return f"| {' | '.join((name, mask, *counts, *cells, accuracy))} |"


def _interval(mean: Mapping[str, float | None]) -> str:
    return f"{_percent(mean['dice'])} ({_percent(mean['low'])} to {_percent(mean['high'])})"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _notes(networks: Mapping[str, Metrics]) -> Iterator[str]:
    """Yield how volumes were counted that screening would not measure as a whole."""
    for name, metrics in networks.items():
        num_at_input = metrics["num_volumes"] - metrics["num_in_source_grid"]
        if num_at_input:
            yield (
                f"{name}: {num_at_input} volumes are grey values without a line to HU or single "
                "slices, counted at the network's input size without a lung mask."
            )
        if metrics["num_rejected"]:
            yield (
                f"{name}: screening would reject {metrics['num_rejected']} volumes, all of whose "
                "lesion counts as missed."
            )


def _share_rows(name: str, metrics: Metrics) -> Iterator[str]:
    for size in metrics["dice_by_lesion_size"]:
        span = f"{100 * size['above']:g}-{100 * size['to']:g} %"
        yield f"| {name} | {span} | {size['num_slices']} | {_percent(size['dice'])} |"


def _px_rows(name: str, mask: str, part: Metrics) -> Iterator[str]:
    for size in part["dice_by_lesion_px"]:
        span = f"above {size['above_px']}"
        if size["to_px"] is not None:
            span = f"{size['above_px'] + 1}-{size['to_px']}"
        yield f"| {name} | {mask} | {span} | {size['num_slices']} | {_percent(size['dice'])} |"

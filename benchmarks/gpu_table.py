"""The results of gpu.py as Markdown tables; only what was measured has a number."""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]
ENGINE_HEAD = (
    "| network, engine | slices a second, network alone | share of GEMM | slices a second, uint16 "
    "to uint8 | batch | peak memory, GiB | levels from float32, mean and largest |\n"
    "|---|---|---|---|---|---|---|"
)
TRAINING_HEAD = (
    "| training step | ms | slices a second | share of GEMM | batch | peak memory, GiB |\n"
    "|---|---|---|---|---|---|"
)


def to_markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of engines and of training steps, and the errors."""
    parts: Mapping[str, Values] = results["parts"]
    environment = results["environment"]
    gemm = parts.get("GEMM", {}).get("flops_per_s")
    rate = "not measured" if gemm is None else f"{gemm / 1e12:.3g} TFLOP/s"
    engines, training, errors = [ENGINE_HEAD], [TRAINING_HEAD], []
    for name, values in parts.items():
        if "error" in values:
            errors.append(f"- {name}: {values['error']}")
        elif "step_seconds" in values:
            training.append(_training_row(name, values, gemm))
        elif "network_slices_per_s" in values:
            engines.append(_engine_row(name, values, gemm))
    head = f"{environment['device']}, torch {environment['torch']}. GEMM in bfloat16: {rate}."
    if environment["is_toy"]:
        head += " A toy on the CPU: no figure of a GPU."
    blocks = [head, "\n".join(engines), "\n".join(training)]
    if errors:
        blocks.append("Not measured:\n\n" + "\n".join(errors))
    return "\n\n".join(blocks) + "\n"


def _engine_row(name: str, values: Values, gemm: float | None) -> str:
    rate = values["network_slices_per_s"]
    apart = f"{values['mean_levels_apart']:.2f}, {values['max_levels_apart']:.1f}"
    cells = [
        name if values["has_graph"] or "graph" not in name else f"{name} (no graph was recorded)",
        f"{rate:.0f}",
        _share(rate, values, gemm),
        f"{values['end_to_end_slices_per_s']:.0f}",
        values["batch_slices"],
        _gib(values),
        apart,
    ]
    return _row(cells)


def _training_row(name: str, values: Values, gemm: float | None) -> str:
    cells = [
        name.removesuffix(": training"),
        f"{1000 * values['step_seconds']:.1f}",
        f"{values['slices_per_s']:.0f}",
        _share(values["slices_per_s"], values, gemm),
        values["batch_size"],
        _gib(values),
    ]
    return _row(cells)


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _share(slices_per_s: float, values: Values, gemm: float | None) -> str:
    return "null" if gemm is None else f"{slices_per_s * values['flops_per_slice'] / gemm:.3f}"


def _gib(values: Values) -> str:
    peak = values["peak_memory_bytes"]
    return "null" if peak is None else f"{peak / 2**30:.1f}"

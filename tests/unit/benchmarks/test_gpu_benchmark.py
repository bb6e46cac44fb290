"""Parts and tables of the benchmark of one GPU; tests/integration runs it as a toy."""

from types import SimpleNamespace
from typing import Any

from repository import ROOT

from benchmarks.gpu_cases import cases, parts
from benchmarks.gpu_table import to_markdown
from covtanet.model.saved_model import load_model

ENGINE = {
    "batch_slices": 64, "has_graph": True, "flops_per_slice": 2e9, "network_slices_per_s": 1000.0,
    "end_to_end_slices_per_s": 800.0, "peak_memory_bytes": 3 << 30, "mean_levels_apart": 0.5,
    "max_levels_apart": 4.0,
}  # fmt: skip
TRAINING = {
    "batch_size": 16, "flops_per_slice": 6e9, "step_seconds": 0.032, "slices_per_s": 500.0,
    "peak_memory_bytes": None,
}  # fmt: skip


def table(**parts: Any) -> list[str]:
    environment = {"device": "Card", "torch": "2", "is_toy": False}
    return to_markdown({"environment": environment, "parts": parts}).splitlines()


def test_share_is_that_of_the_measured_rate() -> None:
    lines = table(GEMM={"flops_per_s": 1e13}, a=ENGINE, b=TRAINING)
    assert lines[0] == "Card, torch 2. GEMM in bfloat16: 10 TFLOP/s."
    # 1000 slices of 2e9 of 1e13; 500 slices of 6e9.
    assert "| a | 1000 | 0.200 | 800 | 64 | 3.0 | 0.50, 4.0 |" in lines
    assert "| b | 32.0 | 500 | 0.300 | 16 | null |" in lines


def test_part_that_failed_is_named_and_shares_without_a_rate_are_null() -> None:
    lines = table(GEMM={"error": "time-out after 40 s"}, a=ENGINE)
    assert "GEMM in bfloat16: not measured" in lines[0]
    assert "| a | 1000 | null | 800 | 64 | 3.0 | 0.50, 4.0 |" in lines
    assert "- GEMM: time-out after 40 s" in lines


def test_graph_that_was_not_recorded_is_said() -> None:
    lines = table(**{"V8: bf16 graph": {**ENGINE, "has_graph": False}})
    assert any(line.startswith("| V8: bf16 graph (no graph was recorded) |") for line in lines)


def test_compiling_comes_last_and_every_part_has_a_limit() -> None:
    names = list(parts(is_toy=False))
    assert names[0] == "GEMM"
    assert all(name.endswith("compiled") for name in names[-3:])
    assert all("toy" not in name for name in names)
    assert all("toy" in name for name in parts(is_toy=True) if name != "GEMM")


def test_shipped_case_is_the_network_of_the_shipped_model() -> None:
    model = load_model(ROOT / "models" / "v8-lung-box")
    case = cases()["V8, shipped, 256 px"]
    assert case.network == model.network.config
    found = SimpleNamespace(size_px=case.size_px, channels=case.shape[0])
    window = model.preprocessing
    assert found == SimpleNamespace(size_px=window.size_px, channels=1 + 2 * window.num_neighbours)

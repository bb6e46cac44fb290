"""Every inference engine at the paper's widths, as a share of the machine's matrix rate."""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import CORES, Result, side_by_side
from covtanet.inference import openvino_engine, pytorch_engine
from covtanet.inference.engine import build_engine
from covtanet.inference.float_engine import FloatEngine
from covtanet.inference.openvino_engine import INT8, missing_instructions
from covtanet.model.covtanet import SIZES, CovTANet

SIZE_PX, BATCH = 256, 4
MATRIX = 2048


def measure() -> list[Result]:
    """(a) the matrix rate of this run and (b) the engines."""
    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    network = CovTANet(SIZES["paper"]).eval().requires_grad_(False)
    slices = np.random.default_rng(0).random((BATCH, 1, SIZE_PX, SIZE_PX), dtype=np.float32)
    with FlopCounterMode(display=False) as counter:
        network.segnet(torch.from_numpy(slices))
    matrix = torch.rand(MATRIX, MATRIX)
    works: dict[str, Callable[[], object]] = {"gemm": partial(torch.matmul, matrix, matrix)}
    answers = {}
    # 8 bits need a calibration, which an untrained network has not.
    engines = (*pytorch_engine.NAMES, *openvino_engine.NAMES)
    names = [name for name in engines if name != INT8 and not missing_instructions(name)]
    for name in names:
        engine = build_engine(copy.deepcopy(network), SIZE_PX, name, CORES)
        assert isinstance(engine, FloatEngine)
        answers[name] = engine.run(slices)[0]
        works[name] = partial(engine.run, slices)
    spent = side_by_side(works)
    rate = 2 * MATRIX**3 / spent["gemm"]
    results = [Result("a", "GEMM, GFLOP/s of this run (what shares refer to)", f"{rate / 1e9:.0f}")]
    for name in names:
        share = counter.get_total_flops() / spent[name] / rate
        ratio = spent["eager"] / spent[name]
        apart = float(np.abs(answers[name] - answers["eager"]).max())
        text = f"{share:.2f} of GEMM, {ratio:.2f} x eager, differs by {apart:.0e}"
        bound = ">= 1.8 x" if name == "openvino" else ""
        results.append(Result("b", f"network, {name}", text, bound))
    return results

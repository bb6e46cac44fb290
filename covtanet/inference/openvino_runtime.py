"""The one import of OpenVINO, without its telemetry, and what the processor can run."""

import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")
# Instructions that add 8-bit products into 32 bits. Without them the sums of two products may
# saturate in 16 bits, and the difference measured at calibration would not hold.
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def import_openvino() -> Any:
    """Import OpenVINO.

    Its Python package reports its import and every conversion to a server on the internet and
    writes a client's id into the home folder, unless its module for that is missing. Hidden, the
    module counts as missing for OpenVINO and for NNCF.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    logging.getLogger("openvino").setLevel(logging.ERROR)
    return openvino


@cache
def core() -> Any:
    """Return OpenVINO's entry point, one per process."""
    return import_openvino().Core()


@cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's instruction sets; empty if the system does not list them."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            return frozenset(values.split())
    return frozenset()


def has_bfloat16() -> bool:
    """Return whether the processor multiplies in bfloat16; emulated, it is far slower."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def has_int8() -> bool:
    """Return whether the processor multiplies 8-bit numbers without saturation."""
    return not cpu_flags().isdisjoint(INT8_FLAGS)

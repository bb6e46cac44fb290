"""Settings of a screening apart from the model."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from covtanet.ct.window import WindowConfig
from covtanet.decoding.process import Limits
from covtanet.model.description import BurdenDiagnosis, Preprocessing, Readout


@dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """Settings of a screening; part of the run's identity."""

    group_by: str = "folder"
    """``folder``: the DICOM objects of a folder with one series UID are a series. ``uid``: those of
    the whole archive, for archives that spread a series over folders."""
    slice_step_mm: float = 2.5
    """Segmented slices lie at least this far apart in mm; a model that was trained with another
    distance brings its own. 0 segments all."""
    max_batch_slices: int | None = None
    """Slices that go to the network together; null for the engine's own number: 64 with
    ``cuda-bf16`` and ``cuda-fp16``, else 16, since more need more memory and are not faster on
    CPUs."""
    flips: bool = False
    """Mean of four flips of every slice (``screen --accurate``). The network takes four times as
    long; on six patients the Dice per volume rose by 0.004."""
    lesion_threshold: float | None = None
    """Probability from which a pixel is lesion; null for the model's."""
    burden: BurdenDiagnosis | None = None
    """A table with ``intercept`` and ``slope``: the diagnosis from the involvement, if the network
    has none; null for the model's."""
    infected_threshold: float = 0.5
    """``p_infected`` from which the diagnosis is infected."""
    severe_threshold: float = 0.5
    """``p_severe`` from which the severity is severe."""
    severe_involvement: float = 0.25
    """Involvement above which a series is severe by the paper's rule (Section III-A)."""
    engine: str = "auto"
    """``auto``, ``eager``, ``channels_last``, ``compiled``, ``openvino``, ``openvino-bf16``,
    ``openvino-int8``, ``cuda-bf16`` or ``cuda-fp16``. Auto takes the fastest engine that the
    machine has and that ``covtanet calibrate`` measured for the model within the bounds, else
    float32: ``openvino`` on a CPU, ``channels_last`` on a GPU."""
    decode_memory_mib: int = 3072
    """Memory of the decoder's process in MiB; 3 GiB hold the largest volume that is read."""
    decode_timeout_s: float = 60.0
    """Seconds for decoding a series, in addition to those that its size explains."""
    max_series_mib: int = 1024
    """A series of more MiB is rejected unread."""
    worker_timeout_s: float = 1800.0
    """Seconds after which a worker is ended that a series still holds."""
    max_pacs_requests: int = 8
    """Series that all decoders together fetch from a PACS at a time, so that it can serve people as
    well. No part of the run's identity, since it changes no number."""
    max_nodes: int | None = None
    """Nodes with CPUs up to which a screening grows while it runs: an autoscaler is asked for them,
    and nodes that join get work. Null for those that are there when it starts. No part of the run's
    identity, since it changes no number."""
    deidentify: bool = False
    """Write keyed digests instead of names and UIDs."""
    allow_weak_sandbox: bool = False
    """Decode even if the kernel cannot confine the decoder. No part of the run's identity, since it
    changes no number."""

    @property
    def decode_limits(self) -> Limits:
        """Limits of the decoder's child process."""
        return Limits(
            memory_mib=self.decode_memory_mib,
            timeout_s=self.decode_timeout_s,
            allow_weak=self.allow_weak_sandbox,
        )

    def __post_init__(self) -> None:
        if self.group_by not in ("folder", "uid"):
            raise ValueError(f"group_by is {self.group_by}, expected folder or uid")
        is_empty = self.max_batch_slices is not None and self.max_batch_slices < 1
        if self.slice_step_mm < 0 or is_empty:
            raise ValueError("slice_step_mm must be at least 0 and max_batch_slices at least 1")
        if self.lesion_threshold is not None and not 0 < self.lesion_threshold < 1:
            raise ValueError(
                f"lesion_threshold is {self.lesion_threshold:g}, expected above 0 and below 1"
            )
        if self.max_pacs_requests < 1:
            raise ValueError("max_pacs_requests must be at least 1")
        if self.max_nodes is not None and self.max_nodes < 1:
            raise ValueError(f"max_nodes is {self.max_nodes}, expected at least 1")
        if self.worker_timeout_s <= 0:
            raise ValueError("worker_timeout_s must be above 0")
        if self.decode_memory_mib < 256 or self.decode_timeout_s <= 0 or self.max_series_mib < 1:
            raise ValueError(
                "decode_memory_mib must be at least 256, decode_timeout_s above 0, "
                "max_series_mib above 0"
            )


def for_model(
    config: ScreeningConfig, preprocessing: Preprocessing, readout: Readout
) -> ScreeningConfig:
    """Return the configuration with the model's values in place of nulls.

    The distance of slices is always that which the model was trained with, if it says so.
    """
    slice_step_mm = preprocessing.slice_step_mm
    threshold = config.lesion_threshold
    return replace(
        config,
        slice_step_mm=config.slice_step_mm if slice_step_mm is None else slice_step_mm,
        lesion_threshold=readout.lesion_threshold if threshold is None else threshold,
        burden=config.burden or readout.burden,
    )


def config_values(window: WindowConfig, config: ScreeningConfig) -> dict[str, Any]:
    """Return every setting that can change a number, for the digest of the configuration."""
    screening = asdict(config)
    for name in ("allow_weak_sandbox", "max_nodes", "max_pacs_requests"):
        del screening[name]
    return {"window": asdict(window), "screening": screening}

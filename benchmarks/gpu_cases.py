"""Networks, sizes and parts that gpu.py measures."""

from dataclasses import dataclass, replace

from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANetConfig, architecture

SHIPPED_ENCODER = "tf_efficientnet_lite0"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network at a size."""

    network: CovTANetConfig
    size_px: int
    train_batch: int
    """Slices of a training step; halved until they fit the memory."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a slice, (C, size, size)."""
        return self.network.segnet.in_channels, self.size_px, self.size_px


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Sizes of everything that is not a network."""

    matrix: int
    """Side of the matrices of the GEMM."""
    batch_slices: int
    num_slices: int
    """Slices end to end."""
    timed_s: float
    """Least time of a measurement."""


FULL = Effort(matrix=8192, batch_slices=64, num_slices=512, timed_s=2.0)
TOY = Effort(matrix=128, batch_slices=2, num_slices=5, timed_s=0.0)

# Engines of ``gpu_inference``, the compiled one last: compiling takes a minute or more.
ENGINES = ("float32", "bf16 eager", "bf16 graph", "bf16 compiled")
TOY_CASE = "V7, toy"


def cases() -> dict[str, Case]:
    """Return the cases by name, the shipped network first."""
    paper = SIZES["paper"]
    size_px = INPUT_PX["paper"]
    # The widths of models/v8-lung-box.
    shipped = replace(
        architecture(
            "V8",
            paper,
            256,
            encoder=SHIPPED_ENCODER,
            stem_channels=16,
            in_channels=3,
            fusion_channels=16,
        ),
        num_slices=16,
        pooled_px=32,
        regional_widths=(16, 24, 32, 48),
        path_channels=64,
        dropout=0.3,
    )
    return {
        "V8, shipped, 256 px": Case(network=shipped, size_px=256, train_batch=32),
        "V8, paper, 512 px": Case(
            network=architecture("V8", paper, size_px), size_px=size_px, train_batch=16
        ),
        "V7, paper, 512 px": Case(
            network=architecture("V7", paper, size_px), size_px=size_px, train_batch=16
        ),
        TOY_CASE: Case(network=architecture("V7", SIZES["tiny"], 32), size_px=32, train_batch=2),
    }


def parts(*, is_toy: bool) -> dict[str, float]:
    """Return the parts in their order, each with its limit in seconds, start included.

    The most useful come first, in case the time runs out. The toy compiles nothing.
    """
    names = [name for name in cases() if (name == TOY_CASE) == is_toy]
    plain = [(f"{name}: {engine}", 45.0) for name in names for engine in ENGINES[:-1]]
    training = [(f"{name}: training", 60.0) for name in names]
    compiled = [] if is_toy else [(f"{name}: {ENGINES[-1]}", 120.0) for name in names]
    return dict([("GEMM", 40.0), *plain, *training, *compiled])

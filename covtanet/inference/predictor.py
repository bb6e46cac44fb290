"""One checkpoint loaded once, volumes answered. No ray, no files, no HTTP."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.ct.window import WindowConfig, spread_slices
from covtanet.errors import CheckpointError
from covtanet.inference.engine import build_engine, to_intensity
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.model.checkpoint import SavedModel


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one volume.

    lesion_levels: (S, H, W) uint8, lesion probability in steps of 1/254, so that 127 is one half.
    p_infected, p_severe: null of a network whose diagnosis was not trained.
    """

    lesion_levels: NDArray[np.uint8]
    p_infected: float | None
    p_severe: float | None


Probabilities = tuple[float, float] | tuple[None, None]


class Part(NamedTuple):
    """Some slices of a volume (S, size, size), and which of them the diagnosis reads."""

    slices: NDArray[np.uint16]
    wanted: list[int]


class Segmented(NamedTuple):
    """Lesion levels of a part (S, H, W), and pooled fusion vectors of its wanted slices (W, C, P, P)."""

    lesion_levels: NDArray[np.uint8]
    pooled: NDArray[np.float32]


class Answers(Protocol):
    """What answers whole volumes."""

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Answer one volume (S, size, size)."""
        ...


class Network(Protocol):
    """What answers slices, in this process or elsewhere. num_slices: of a volume, for its diagnosis."""

    num_slices: int

    def segment(self, parts: Iterable[Part]) -> Iterator[Segmented]:
        """Answer the parts of one volume, in their order."""
        ...

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Pooled fusion vectors of a volume (num_slices, C, P, P) to probabilities of infected and of severe."""
        ...


def predict(network: Network, slices: NDArray[np.uint16], part_slices: int) -> Prediction:
    """Answer one volume. slices: (S, size, size) as ``window.to_input`` makes them, S at least 1.

    At most ``part_slices`` go to the network together, so memory does not grow with the volume.
    """
    picked = spread_slices(len(slices), network.num_slices)
    starts = range(0, len(slices), part_slices)
    parts = (
        Part(
            slices[start : start + part_slices],
            [k - start for k in np.unique(picked) if 0 <= k - start < part_slices],
        )
        for start in starts
    )
    levels, pooled = zip(*network.segment(parts), strict=True)
    by_slice = dict(zip(np.unique(picked).tolist(), np.concatenate(pooled), strict=True))
    p_infected, p_severe = network.diagnose(
        np.stack([by_slice[index] for index in picked.tolist()])
    )
    return Prediction(
        lesion_levels=np.concatenate(levels), p_infected=p_infected, p_severe=p_severe
    )


class Predictor:
    """Segments and diagnoses prepared volumes with one model; a ``Network`` of this process."""

    def __init__(
        self,
        model: SavedModel,
        *,
        engine: str = "auto",
        num_threads: int = 1,
        max_batch_slices: int = 16,
    ) -> None:
        self.window = window_of(model)
        self.max_batch_slices = max_batch_slices
        self.network = model.network
        self.num_slices = model.network.config.num_slices
        self.diagnoses = model.capabilities.diagnoses
        self.engine = build_engine(model.network, self.window.size_px, engine, num_threads)
        torch.set_num_threads(num_threads)

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Answer one volume, see ``predict``."""
        return predict(self, slices, self.max_batch_slices)

    def segment(self, parts: Iterable[Part]) -> Iterator[Segmented]:
        """Answer parts one by one.

        Raises:
            FloatingPointError: where the network's answer is no number.
        """
        for slices, wanted in parts:
            probability, pooled = self.engine.segment(to_intensity(slices))
            if not np.isfinite(probability).all():
                raise FloatingPointError("the network's answer is no number")
            yield Segmented(
                np.rint(probability * PROBABILITY_STEPS).astype(np.uint8), pooled[wanted]
            )

    def segment_together(self, parts: Sequence[Part]) -> Iterator[Segmented]:
        """Answer parts of several volumes, whose slices share the network's batches."""
        slices = np.concatenate([part.slices for part in parts])
        size = self.max_batch_slices
        every = [
            Part(slices[k : k + size], list(range(len(slices[k : k + size]))))
            for k in range(0, len(slices), size)
        ]
        levels, pooled = (np.concatenate(each) for each in zip(*self.segment(every), strict=True))
        start = 0
        for part in parts:
            end = start + len(part.slices)
            yield Segmented(levels[start:end], pooled[start:end][part.wanted])
            start = end

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Answer a volume's pooled vectors; nulls where phase 2 was not trained.

        Raises:
            FloatingPointError: where the network's answer is no number.
        """
        if not self.diagnoses:
            return None, None
        with torch.inference_mode():
            device = next(self.network.parameters()).device
            logits = torch.cat(
                self.network.classifier(torch.from_numpy(pooled)[None].to(device))
            ).float()
            p_infected, p_severe = torch.sigmoid(logits).tolist()
        if not math.isfinite(p_infected + p_severe):
            raise FloatingPointError("the network's answer is no number")
        return p_infected, p_severe


def refuse_without_segmentation(model: SavedModel) -> None:
    """Refuse a model that cannot screen.

    Raises:
        CheckpointError: where it marks no lesions: an involvement of 0 would be made up.
    """
    if not model.capabilities.segments:
        raise CheckpointError(
            "the model marks no lesions, and a ledger without involvement is no screening"
        )


def window_of(model: SavedModel) -> WindowConfig:
    """Return the window and slice size that a model was trained with.

    Raises:
        CheckpointError: an empty window or an unsupported size.
    """
    values = model.preprocessing
    try:
        return WindowConfig(low_hu=values.low_hu, high_hu=values.high_hu, size_px=values.size_px)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"invalid window of the model: {type(error).__name__}") from error

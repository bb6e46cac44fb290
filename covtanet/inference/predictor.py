"""Lesion maps and probabilities of whole volumes, from one model that is loaded once.

No Ray, no files, no HTTP: ``Predictor`` runs the network in this process; the endpoint has another
``Network`` that asks a replica.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.ct.window import WindowConfig, spread_slices, with_neighbours
from covtanet.inference.chunks import SegmentedChunk, SliceChunk, join, split
from covtanet.inference.engine import build_engine
from covtanet.inference.model_window import check_capabilities, model_window
from covtanet.model.saved_model import SavedModel


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The network's output for one volume."""

    lesion_levels: NDArray[np.uint8]
    """Lesion probability in steps of 1/254, (S, H, W), so that 127 is one half."""
    p_infected: float | None
    """Null if the model's diagnosis was not trained."""
    p_severe: float | None
    """Null if the model's diagnosis was not trained."""
    engine: str | None = None
    """The engine that ran the network; null if the network does not say. Two names joined by ``+``
    if replicas on different processors shared the volume."""


Probabilities = tuple[float, float] | tuple[None, None]


class VolumePredictor(Protocol):
    """Predicts whole volumes."""

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Predict one volume (S, size, size)."""
        ...


class Network(Protocol):
    """Runs the network on slices, in this process or elsewhere."""

    num_slices: int
    """Slices of a volume that the diagnosis reads."""
    num_neighbours: int
    """Slices on either side that the network reads together with a slice."""

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment the chunks of one volume, in their order."""
        ...

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Return p_infected and p_severe from fusion vectors (num_slices, C, P, P)."""
        ...


def predict(network: Network, slices: NDArray[np.uint16], chunk_slices: int) -> Prediction:
    """Predict one volume, at most ``chunk_slices`` slices at a time.

    slices: (S, size, size) as ``window.to_input`` returns them, S at least 1.
    """
    # A volume with fewer slices than the diagnosis reads repeats some of them.
    picked = spread_slices(len(slices), network.num_slices)
    # Each slice is segmented once, even if the diagnosis reads it twice.
    distinct = np.unique(picked)
    chunks = (
        _chunk(slices, start, chunk_slices, network.num_neighbours, distinct)
        for start in range(0, len(slices), chunk_slices)
    )
    # levels: (S, H, W) in chunks. pooled: (D, C, P, P) in chunks.
    levels, pooled, engines = zip(*network.segment(chunks), strict=True)
    by_slice = dict(zip(distinct.tolist(), np.concatenate(pooled), strict=True))
    # (num_slices, C, P, P), repeats included.
    vectors = np.stack([by_slice[index] for index in picked.tolist()])
    p_infected, p_severe = network.diagnose(vectors)
    return Prediction(
        lesion_levels=np.concatenate(levels),
        p_infected=p_infected,
        p_severe=p_severe,
        engine="+".join(sorted(set(engines))) or None,
    )


def _chunk(
    slices: NDArray[np.uint16],
    start: int,
    chunk_slices: int,
    num_neighbours: int,
    picked: NDArray[np.intp],
) -> SliceChunk:
    end = min(start + chunk_slices, len(slices))
    # Indices within the chunk, not within the volume.
    inside = picked[(picked >= start) & (picked < end)]
    # Neighbours come from the whole volume, also across the chunk's ends.
    channels = with_neighbours(slices, np.arange(start, end), num_neighbours)
    return SliceChunk(channels, (inside - start).tolist())


class Predictor:
    """Segments and diagnoses prepared volumes with one model in this process."""

    def __init__(
        self,
        model: SavedModel,
        *,
        engine: str = "auto",
        num_threads: int = 1,
        max_batch_slices: int | None = None,
        flips: bool = False,
    ) -> None:
        """Make a model ready to run.

        max_batch_slices: slices that go to the network together; null for the engine's own number.
        flips: mean of four flips of every slice.
        """
        self.window = window_of(model)
        self.network = model.network
        self.num_slices = model.network.config.num_slices
        self.num_neighbours = self.window.num_neighbours
        self.diagnoses = model.capabilities.diagnoses
        self.engine = build_engine(
            model.network,
            self.window.size_px,
            engine,
            num_threads,
            differences=model.engines,
            quantizers=model.quantizers,
            is_saved=bool(model.digest),
            batch_slices=max_batch_slices,
            flips=flips,
        )
        torch.set_num_threads(num_threads)

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Predict one volume; see ``predict``."""
        return predict(self, slices, self.engine.batch_slices)

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks in their order, each of at most ``engine.batch_slices``.

        Raises:
            FloatingPointError: the network's output is NaN or infinite.
        """
        return self.engine.segment(chunks)

    def segment_together(self, chunks: Sequence[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks of several volumes, whose slices share the network's batches."""
        batches = join(chunks, self.engine.batch_slices)
        return split(list(self.segment(batches)), chunks)

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Return p_infected and p_severe of a volume; nulls if phase 2 was not trained.

        Raises:
            FloatingPointError: the network's output is NaN or infinite.
        """
        if not self.diagnoses:
            return None, None
        with torch.inference_mode():
            device = next(self.network.parameters()).device
            # (1, num_slices, C, P, P)
            vectors = torch.from_numpy(pooled)[None].to(device)
            logits = torch.cat(self.network.classifier(vectors)).float()
            p_infected, p_severe = torch.sigmoid(logits).tolist()
        if not math.isfinite(p_infected + p_severe):
            raise FloatingPointError("the network's output is NaN or infinite")
        return p_infected, p_severe


def refuse_without_segmentation(model: SavedModel) -> None:
    """Refuse a model that cannot screen.

    Raises:
        CheckpointError: as ``model_window.check_capabilities``.
    """
    check_capabilities(model.capabilities)


def window_of(model: SavedModel) -> WindowConfig:
    """Return the step from HU to the network's input that a model was trained with.

    Raises:
        CheckpointError: as ``model_window.model_window``.
    """
    return model_window(model.preprocessing, model.network.config.segnet.in_channels)

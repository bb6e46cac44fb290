"""One checkpoint loaded once, volumes answered. No ray, no files, no HTTP."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.ct.window import WindowConfig, spread_slices
from covtanet.model.checkpoint import SavedModel
from covtanet.screening.engine import build_engine, to_intensity
from covtanet.screening.records import PROBABILITY_STEPS


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one volume.

    lesion_levels: (S, H, W) uint8, lesion probability in steps of 1/254, so that 127 is one half.
    """

    lesion_levels: NDArray[np.uint8]
    p_infected: float
    p_severe: float


class Predictor:
    """Segments and diagnoses prepared volumes with one model."""

    def __init__(
        self, model: SavedModel, *, engine: str = "auto", num_threads: int = 1, max_batch_slices: int = 16
    ) -> None:
        self.window = window_of(model)
        self.max_batch_slices = max_batch_slices
        self.network = model.network
        self.engine = build_engine(model.network, self.window.size_px, engine, num_threads)
        torch.set_num_threads(num_threads)

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Answer one volume. slices: (S, size, size) as ``window.to_input`` makes them, S at least 1.

        The network sees at most ``max_batch_slices`` at a time, so memory does not grow with the volume.
        """
        picked = spread_slices(len(slices), self.network.config.num_slices)
        wanted = set(picked.tolist())
        lesion_levels = np.empty(slices.shape, np.uint8)
        pooled_by_slice: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(slices), self.max_batch_slices):
            batch = slices[start : start + self.max_batch_slices]
            probability, pooled = self.engine.segment(to_intensity(batch))
            if not np.isfinite(probability).all():
                raise FloatingPointError("the network's answer is no number")
            lesion_levels[start : start + len(batch)] = np.rint(probability * PROBABILITY_STEPS)
            for index in wanted.intersection(range(start, start + len(batch))):
                pooled_by_slice[index] = pooled[index - start]
        pooled_volume = torch.from_numpy(np.stack([pooled_by_slice[index] for index in picked.tolist()]))
        with torch.inference_mode():
            device = next(self.network.parameters()).device
            logits = torch.cat(self.network.classifier(pooled_volume[None].to(device))).float()
            p_infected, p_severe = torch.sigmoid(logits).tolist()
        if not math.isfinite(p_infected + p_severe):
            raise FloatingPointError("the network's answer is no number")
        return Prediction(lesion_levels=lesion_levels, p_infected=p_infected, p_severe=p_severe)


def window_of(model: SavedModel) -> WindowConfig:
    """The preprocessing a model was trained with."""
    return WindowConfig(**model.preprocessing["window"])

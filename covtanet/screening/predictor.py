"""One checkpoint loaded once, volumes answered. No ray, no files, no HTTP."""

import math
from collections.abc import Sequence
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
        """Answer one volume. slices: (S, size, size) as ``window.to_input`` makes them, S at least 1."""
        return self.predict_all([slices])[0]

    def predict_all(self, volumes: Sequence[NDArray[np.uint16]]) -> list[Prediction]:
        """Answer several volumes, whose slices share the network's batches.

        The network sees at most ``max_batch_slices`` at a time, so memory does not grow with a volume.
        """
        picked = [spread_slices(len(slices), self.network.config.num_slices).tolist() for slices in volumes]
        lesion_levels = [np.empty(slices.shape, np.uint8) for slices in volumes]
        pooled_by_slice: list[dict[int, NDArray[np.float32]]] = [{} for _ in volumes]
        places = [(number, index) for number, slices in enumerate(volumes) for index in range(len(slices))]
        for start in range(0, len(places), self.max_batch_slices):
            batch = places[start : start + self.max_batch_slices]
            slices = np.stack([volumes[number][index] for number, index in batch])
            probability, pooled = self.engine.segment(to_intensity(slices))
            if not np.isfinite(probability).all():
                raise FloatingPointError("the network's answer is no number")
            levels = np.rint(probability * PROBABILITY_STEPS).astype(np.uint8)
            for at, (number, index) in enumerate(batch):
                lesion_levels[number][index] = levels[at]
                if index in picked[number]:
                    pooled_by_slice[number][index] = pooled[at].copy()
        return [
            self._diagnose(levels, np.stack([pooled[index] for index in indices]))
            for levels, pooled, indices in zip(lesion_levels, pooled_by_slice, picked, strict=True)
        ]

    def _diagnose(self, lesion_levels: NDArray[np.uint8], pooled_volume: NDArray[np.float32]) -> Prediction:
        with torch.inference_mode():
            device = next(self.network.parameters()).device
            logits = torch.cat(self.network.classifier(torch.from_numpy(pooled_volume)[None].to(device))).float()
            p_infected, p_severe = torch.sigmoid(logits).tolist()
        if not math.isfinite(p_infected + p_severe):
            raise FloatingPointError("the network's answer is no number")
        return Prediction(lesion_levels=lesion_levels, p_infected=p_infected, p_severe=p_severe)


def window_of(model: SavedModel) -> WindowConfig:
    """The preprocessing a model was trained with."""
    return WindowConfig(**model.preprocessing["window"])

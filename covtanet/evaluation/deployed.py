"""Evaluation of one volume as screening reads it, counted in the grid of its source.

Lungs, slices, input, lesion mask and involvement come from the functions that screening calls. Not
covered: checks that screening makes before a volume is read, such as its size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import Involvement, measure_involvement
from covtanet.ct.masks import Mask
from covtanet.ct.volume import Volume
from covtanet.ct.window import WindowConfig, hu_to_intensity
from covtanet.data.source import SourceVolume
from covtanet.decoding.prepare import prepare_volume
from covtanet.errors import StudyError
from covtanet.evaluation.rows import (
    COUNTS,
    UNMASKED_COUNTS,
    EvaluatedModel,
    Evaluation,
    Row,
    count_pixels,
)
from covtanet.inference.lesion_mask import lesion_in_source
from covtanet.model.description import infected_by_burden


@dataclass(frozen=True, kw_only=True)
class Screened:
    """Output of screening for one volume. Masks are (z, y, x) bool in the volume's grid."""

    lesion_mask: Mask
    """As predicted on the slices with lung, not cut to the lungs."""
    lesion_in_lungs: Mask
    """Cut to lungs and chest cavity."""
    has_lung: NDArray[np.bool_]
    """(z,), slices that screening measures."""
    reason: str | None = None
    """Code of the rejection; nothing is marked then."""
    involvement: float | None = None
    p_infected: float | None = None
    p_severe: float | None = None


def evaluate_source(model: EvaluatedModel, row: Row, source: SourceVolume) -> Evaluation:
    """Predict one volume in HU as screening does, and count pixels per slice of its source.

    row: that of ``new_row``. Counted are all slices that screening measures, and the slices with
    true lesion beyond them, whose lesion is missed. A volume that screening rejects has a reason,
    and all of its lesion is missed.
    """
    screened = screen(model, source.ct)
    lesion = source.lesion if model.segments else None
    is_counted = screened.has_lung
    if lesion is not None:
        is_counted = is_counted | lesion.any(axis=(1, 2))
    counted = np.flatnonzero(is_counted)
    row = {
        **row,
        "reason": screened.reason,
        "p_infected": screened.p_infected,
        "p_severe": screened.p_severe,
        "involvement": screened.involvement if model.segments else None,
        "slice": counted.tolist(),
    }
    intensity = _intensity(source.ct, counted, model.window)
    if lesion is None:
        return Evaluation(row=row, intensity=intensity)
    truth = lesion[counted]
    lesion_in_lungs = screened.lesion_in_lungs[counted]
    row |= count_pixels(lesion_in_lungs, truth, COUNTS)
    row |= count_pixels(screened.lesion_mask[counted], truth, UNMASKED_COUNTS)
    return Evaluation(row=row, intensity=intensity, lesion_mask=lesion_in_lungs, truth=truth)


def screen(model: EvaluatedModel, volume: Volume) -> Screened:
    """Return what screening would measure in a volume."""
    try:
        masks, chosen, slices = prepare_volume(volume, model.window, model.slice_step_mm)
    except StudyError as error:
        return _rejected(volume, str(error.reason))
    prediction = model.predictor.predict(slices)
    lesion_mask, _ = lesion_in_source(
        prediction.lesion_levels,
        chosen.astype(np.int64),
        masks.lungs,
        masks.spacing_mm,
        model.window,
        model.readout.lesion_threshold,
    )
    measured = measure_involvement(masks.lungs, lesion_mask, masks.voxel_ml)
    involvement = measured.involvement
    if len(volume.hu) == 1:
        # One slice always cuts the lungs. Screening refuses such a volume; in a data set of one
        # slice per study its lesion share stands for the involvement.
        involvement = _lesion_share(measured)
    p_infected = prediction.p_infected
    if p_infected is None:
        p_infected = infected_by_burden(model.readout.burden, involvement)
    return Screened(
        lesion_mask=lesion_mask,
        lesion_in_lungs=measured.lesion_mask,
        has_lung=np.asarray(masks.lungs.lung_mask.any(axis=(1, 2))),
        involvement=involvement,
        p_infected=p_infected,
        p_severe=prediction.p_severe,
    )


def _lesion_share(measured: Involvement) -> float:
    """Return lesion over lung of what is shown, whether or not the lungs are cut."""
    num_lung = int(np.count_nonzero(measured.lung_mask))
    return int(np.count_nonzero(measured.lesion_mask)) / num_lung


def _rejected(volume: Volume, reason: str) -> Screened:
    nothing = np.zeros(volume.hu.shape, bool)
    return Screened(
        lesion_mask=nothing,
        lesion_in_lungs=nothing,
        has_lung=np.zeros(len(volume.hu), bool),
        reason=reason,
    )


def _intensity(
    volume: Volume, indices: NDArray[np.intp], window: WindowConfig
) -> NDArray[np.uint16]:
    """Return slices in steps of intensity, (S, y, x), in the pixels of the source."""
    out = np.empty((len(indices), *volume.hu.shape[1:]), np.uint16)
    for position, index in enumerate(indices):
        # Slice by slice: float32 of all slices would take twice the memory of the volume.
        out[position] = hu_to_intensity(volume.hu[index].astype(np.float32), window)
    return out

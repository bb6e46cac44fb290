"""Screening with a model that reads the lung box, neighbouring slices and flips."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from saved_models import small_model
from scipy import ndimage
from screened_series import BrightnessPredictor, new_record
from stage_rows import CONFIG, WINDOW

from covtanet import drawing
from covtanet.ct.window import WindowConfig
from covtanet.decoding.prepare import prepare_volume
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.float_engine import FloatEngine
from covtanet.inference.predictor import Predictor, Probabilities, predict
from covtanet.phantoms.phantom import Phantom
from covtanet.screening import stages
from covtanet.screening.records import MeasuredSeries, PredictedSeries, PreparedSeries

LUNG_BOX = replace(WINDOW, crops_to_lungs=True)


def screen(volume: Any, window: WindowConfig) -> tuple[PredictedSeries, MeasuredSeries]:
    """Screen a volume by the brightness of its pixels."""
    masks, chosen, slices = prepare_volume(volume, window, CONFIG.slice_step_mm)
    prepared = PreparedSeries(record=new_record(), slices=slices, chosen=chosen, masks=masks.pack())
    predicted = stages.predict_series(prepared, BrightnessPredictor())
    return predicted, stages.measure_series(predicted, window, CONFIG)


def test_lesion_of_the_lung_box_returns_to_its_place_in_the_source(
    mild_volume: Any, mild: Phantom
) -> None:
    """As much of the true lesion is marked as in whole slices, and little else."""
    # Core of the lesion: at its edge a pixel of the network averages lesion and lung.
    core = ndimage.binary_erosion(mild.lesion_mask, np.ones((1, 3, 3), bool))
    shares = []
    for window in (WINDOW, LUNG_BOX):
        _, measured = screen(mild_volume, window)
        assert measured.involvement is not None
        marked = measured.involvement.lesion_mask
        shares.append(np.count_nonzero(marked & core) / np.count_nonzero(core))
        assert np.count_nonzero(marked & ~mild.lesion_mask) < 0.1 * marked.size
    # Noise of single pixels hides about half of the lesion from a threshold in HU.
    assert shares[0] > 0.4
    assert shares[1] > 0.95 * shares[0]


def test_lung_box_shows_the_lungs_larger_than_the_whole_slice(mild_volume: Any) -> None:
    """The lungs reach from edge to edge of the network's input, up to the margin of 8 %."""
    _, _, slices = prepare_volume(mild_volume, LUNG_BOX, CONFIG.slice_step_mm)
    is_air = slices < 65535 * 0.3
    columns = np.flatnonzero(is_air[:, 20:-20, :].any(axis=(0, 1)))
    assert columns[0] < 0.1 * LUNG_BOX.size_px
    assert columns[-1] > 0.9 * LUNG_BOX.size_px


def test_pictures_of_the_lung_box_show_the_marks_on_the_lesion(mild_volume: Any) -> None:
    """In the viewer the marks lie where the network marked the same slices."""
    predicted, measured = screen(mild_volume, LUNG_BOX)
    assert measured.masks is not None
    assert measured.involvement is not None
    prepared = predicted.prepared
    files = dict(
        drawing.result_files(
            prepared.slices, prepared.chosen, measured.masks, measured.involvement, LUNG_BOX
        )
    )
    viewer = np.asarray(Image.open(BytesIO(files["viewer.png"])))
    size = LUNG_BOX.size_px
    rows, columns = viewer.shape[0] // size, viewer.shape[1] // size
    # (rows, side, columns, side) -> (tiles, side, side)
    tiles = viewer[..., 1].reshape(rows, size, columns, size).swapaxes(1, 2)
    marked = tiles.reshape(-1, size, size)[: len(prepared.slices)] == 2
    assert np.count_nonzero(marked) > 100
    agreement = np.count_nonzero(marked & (predicted.lesion_levels >= 127))
    assert agreement / np.count_nonzero(marked) > 0.8


class Channels:
    """A network that answers with the channels of every slice, the first pixel of each."""

    num_slices = 4
    num_neighbours = 1

    def __init__(self) -> None:
        self.channels: list[list[int]] = []

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        for slices, diagnosed in chunks:
            self.channels += slices[:, :, 0, 0].tolist()
            levels = np.zeros((len(slices), 2, 2), np.uint8)
            yield SegmentedChunk(levels, np.zeros((len(diagnosed), 1, 1, 1), np.float32))

    def diagnose(self, pooled: np.ndarray) -> Probabilities:
        return None, None


@pytest.mark.parametrize("chunk_slices", [1, 2, 5, 16])
def test_neighbours_are_those_of_the_volume_whatever_the_chunk(chunk_slices: int) -> None:
    network = Channels()
    slices = np.arange(5, dtype=np.uint16)[:, None, None].repeat(2, 1).repeat(2, 2)
    predict(network, slices, chunk_slices)
    assert network.channels == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4]]


def test_flips_give_the_mean_of_four_views() -> None:
    """A network that sees more lesion to the right and to the bottom of its input."""
    predictor = Predictor(small_model(), engine="eager", flips=True)
    ramp = np.linspace(0, 0.4, 4, dtype=np.float32)
    weight = ramp[:, None] + ramp[None, :]

    def run(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return slices[:, 0] * weight, slices[:, :, :1, :1]

    assert isinstance(predictor.engine, FloatEngine)
    predictor.engine = replace(predictor.engine, run=run)
    slices = np.zeros((1, 1, 4, 4), np.uint16)
    slices[0, 0, 0, 3] = 65535
    (chunk,) = predictor.segment([SliceChunk(slices, [0])])
    # The corner is seen at all four corners of the weights: 0, 0.4, 0.4 and 0.8.
    expected = np.zeros((4, 4))
    expected[0, 3] = round(0.4 * 254)
    np.testing.assert_array_equal(chunk.lesion_levels[0], expected)
    # The diagnosis reads the slices as they are.
    assert chunk.pooled.tolist() == [[[[0.0]]]]

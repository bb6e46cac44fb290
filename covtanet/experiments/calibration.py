"""Calibration of a saved model for engines below float32, and the measure of each engine.

Some labelled volumes give the ranges of the 8-bit numbers. All others, of other patients, are
screened by every engine and compared with float32.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from covtanet import storage
from covtanet.ct.window import spread_slices, with_neighbours
from covtanet.data.datasets import DataSource
from covtanet.data.labels import LabelledVolume
from covtanet.data.source import SourceVolume, paths_of, read_source
from covtanet.decoding.prepare import prepare_volume
from covtanet.errors import ConfigError, StudyError
from covtanet.evaluation.engine_difference import EngineResult, compare_engines, run_engine
from covtanet.evaluation.pipeline import step_of
from covtanet.evaluation.rows import EvaluatedModel
from covtanet.inference.float_engine import to_intensity
from covtanet.inference.openvino_engine import BFLOAT16, FLOAT32, INT8, missing_instructions
from covtanet.inference.predictor import Predictor, window_of
from covtanet.inference.quantize import has_nncf, quantize
from covtanet.inference.segmenter import EngineInput
from covtanet.model.quantizers import Quantizers
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

# Engines below float32, in the order in which they are measured.
CALIBRATED = (BFLOAT16, INT8)


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Labelled volumes by their use, and the names of their data sets."""

    sources: Mapping[str, DataSource]
    """Data sets by name."""
    calibration: Sequence[tuple[str, LabelledVolume]]
    """Data set and volume whose slices give the ranges."""
    held_out: Sequence[tuple[str, LabelledVolume]]
    """Data set and volume that are measured, none of a patient of ``calibration``."""

    def read(self, name: str, volume: LabelledVolume) -> SourceVolume:
        """Read a volume of a data set; its lungs are found as screening finds them."""
        volume = replace(volume, lung_mask_path=None)
        root = self.sources[name].root
        contents = {
            path: storage.read_bytes(storage.resolve(root, path)) for path in paths_of(volume)
        }
        return read_source(volume, contents)


def default_engines() -> list[str]:
    """Return the engines below float32 that this machine can give."""
    return [
        name
        for name in CALIBRATED
        if not missing_instructions(name) and (name != INT8 or has_nncf())
    ]


def split_data(
    sources: Mapping[str, DataSource], every: int, measured_only: str = ""
) -> CalibrationData:
    """Take one patient in ``every`` for calibration, in the order of names; measure the others.

    measured_only: a data set of which no patient is taken.

    Raises:
        ConfigError: no volume is left for either.
    """
    calibration: list[tuple[str, LabelledVolume]] = []
    held_out: list[tuple[str, LabelledVolume]] = []
    for name, source in sources.items():
        labelled = [volume for volume in source.volumes if volume.slice_order == "continuous"]
        patients = sorted({volume.patient for volume in labelled})
        chosen = set() if name == measured_only else set(patients[::every])
        for volume in labelled:
            (calibration if volume.patient in chosen else held_out).append((name, volume))
    if not calibration or not held_out:
        raise ConfigError(
            f"{len(calibration)} volumes for calibration and {len(held_out)} others to measure, "
            "expected at least one of each"
        )
    return CalibrationData(sources=sources, calibration=calibration, held_out=held_out)


def calibrate(
    model: SavedModel,
    data: CalibrationData,
    engines: Sequence[str],
    num_slices: int,
    num_threads: int,
) -> SavedModel:
    """Return the model with the measured difference of these engines, and with their parameters.

    num_slices: slices that the ranges of ``openvino-int8`` are taken from.

    Raises:
        ConfigError: a library or the processor cannot give an engine, or no volume can be read.
    """
    # Not a saved model until it is saved: nothing of it is kept compiled.
    model = replace(model, engines={}, quantizers=None, digest="")
    quantizers = None
    if INT8 in engines:
        slices = calibration_slices(model, data, num_slices)
        quantizers = quantize_model(model, slices, num_threads)
        model = replace(model, quantizers=quantizers)
    results = measure(model, data, (FLOAT32, *engines), num_threads)
    names = sorted({name for name, _ in data.held_out})
    differences = {
        engine: compare_engines(results[engine], results[FLOAT32], names) for engine in engines
    }
    used: dict[str, object] = {"data": sorted({name for name, _ in data.calibration})}
    if quantizers is not None:
        used |= {"num_slices": num_slices, "num_volumes": len(data.calibration)}
    provenance = {**model.provenance, "calibration": used}
    return replace(model, engines=differences, provenance=provenance)


def quantize_model(model: SavedModel, slices: NDArray[np.uint16], num_threads: int) -> Quantizers:
    """Return the parameters of a model in 8 bits. slices: (S, C, size, size)."""
    source = EngineInput(
        network=model.network,
        size_px=model.preprocessing.size_px,
        num_threads=num_threads,
        quantizers=None,
        is_saved=False,
    )
    return quantize(source, to_intensity(slices))


def calibration_slices(
    model: SavedModel, data: CalibrationData, num_slices: int
) -> NDArray[np.uint16]:
    """Return slices spread over the calibration volumes, (num_slices, C, size, size).

    Raises:
        ConfigError: the volumes have fewer slices, or none can be read.
    """
    window = window_of(model)
    by_volume = []
    for name, volume in data.calibration:
        source = data.read(name, volume)
        try:
            _, _, slices = prepare_volume(source.ct, window, step_of(model))
        except StudyError as error:
            logger.warning("volume %s is left out: %s", volume.patient, error.reason)
            continue
        by_volume.append(with_neighbours(slices, np.arange(len(slices)), window.num_neighbours))
    total = sum(map(len, by_volume))
    if total < num_slices:
        raise ConfigError(f"{total} slices for calibration, expected at least {num_slices}")
    return np.concatenate(by_volume)[spread_slices(total, num_slices)]


def measure(
    model: SavedModel, data: CalibrationData, engines: Sequence[str], num_threads: int
) -> dict[str, list[EngineResult]]:
    """Return the results of the held-out volumes by engine, in the order of the volumes."""
    models = {name: _evaluated(model, name, num_threads) for name in engines}
    results: dict[str, list[EngineResult]] = {name: [] for name in engines}
    for name, volume in data.held_out:
        # Read once, screened by every engine.
        source = data.read(name, volume)
        for engine, evaluated in models.items():
            results[engine].append(run_engine(evaluated, volume.patient, source))
        logger.info("measured %s of %s", volume.patient, name)
    return results


def _evaluated(model: SavedModel, engine: str, num_threads: int) -> EvaluatedModel:
    predictor = Predictor(model, engine=engine, num_threads=num_threads)
    return EvaluatedModel(
        predictor=predictor,
        window=predictor.window,
        readout=model.readout,
        slice_step_mm=step_of(model),
        segments=model.capabilities.segments,
    )

"""Calibration of a saved model for engines below float32, and the measure of each engine.

Some labelled volumes give the ranges of the 8-bit numbers. All others, of other patients, are
screened by every engine and compared with float32. Engines of CPUs and of GPUs are measured in
calls of their own, against float32 on the same device; differences of the other kind stay.
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
from covtanet.inference import device_engine
from covtanet.inference.engine import FLOAT32_ON_GPU, below_float32, missing_on_this_machine
from covtanet.inference.float_engine import to_intensity
from covtanet.inference.openvino_engine import BFLOAT16, FLOAT32, INT8
from covtanet.inference.predictor import Predictor, window_of
from covtanet.inference.quantize import has_nncf, import_nncf, quantize
from covtanet.inference.segmenter import EngineInput
from covtanet.model.quantizers import Quantizers
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

# Engines below float32, in the order in which they are measured.
CALIBRATED = (BFLOAT16, INT8, *device_engine.NAMES)


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
    """Return the engines below float32 that this machine can give; with a GPU, those of the GPU."""
    possible = [name for name in below_float32() if name != INT8 or has_nncf()]
    return [name for name in CALIBRATED if name in possible]


def check_engines(engines: Sequence[str]) -> None:
    """Refuse engines that cannot be measured here together.

    Raises:
        ConfigError: this machine cannot give one, or some are of CPUs and some of GPUs.
    """
    for name in engines:
        missing = missing_on_this_machine(name)
        if missing:
            raise ConfigError(f"engine {name}: {missing}")
    if len({is_of_gpu(name) for name in engines}) > 1:
        raise ConfigError(
            "engines of CPUs and of GPUs, expected one kind: measure them in two calls, the second "
            "of which takes the model of the first"
        )


def is_of_gpu(engine: str) -> bool:
    """Return whether an engine runs on GPUs."""
    return engine in device_engine.NAMES


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
        ConfigError: a library or the machine cannot give an engine, engines of CPUs and of GPUs, or
            no volume can be read.
    """
    check_engines(engines)
    data_names = sorted({name for name, _ in data.held_out})
    # Not a saved model until it is saved: nothing of it is kept compiled.
    uncalibrated = replace(model, engines={}, quantizers=None, digest="")
    if is_of_gpu(engines[0]):
        names = (FLOAT32_ON_GPU, *engines)
        results = measure(uncalibrated, data, names, num_threads)
        return with_differences(model, engines, results, data_names)
    quantizers = None
    used: dict[str, object] = {"data": sorted({name for name, _ in data.calibration})}
    if INT8 in engines:
        import_nncf()  # before volumes are read, so that its lack is told at once
        slices = calibration_slices(uncalibrated, data, num_slices)
        quantizers = quantize_model(uncalibrated, slices, num_threads)
        used |= {"num_slices": num_slices, "num_volumes": len(data.calibration)}
    calibrated = replace(
        model,
        quantizers=quantizers,
        provenance={**model.provenance, "calibration": used},
        digest="",
    )
    results = measure(calibrated, data, (FLOAT32, *engines), num_threads)
    return with_differences(calibrated, engines, results, data_names)


def with_differences(
    model: SavedModel,
    engines: Sequence[str],
    results: Mapping[str, Sequence[EngineResult]],
    data_names: Sequence[str],
) -> SavedModel:
    """Return the model with these engines' differences, and those of the other kind of device.

    results: of the float32 engine first. data_names: of the data sets of the held-out volumes.
    """
    float32 = next(iter(results.values()))
    kept = {
        name: difference
        for name, difference in model.engines.items()
        if is_of_gpu(name) != is_of_gpu(engines[0])
    }
    measured = {name: compare_engines(results[name], float32, data_names) for name in engines}
    return replace(model, engines={**kept, **measured}, digest="")


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

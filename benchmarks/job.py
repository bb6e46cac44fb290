"""The screening job against a plain loop over its stages, and its memory at two lengths."""

from pathlib import Path

from benchmarks.measure import CORES, Result, say, seconds
from benchmarks.screening_runs import archive, model_folder, run_job
from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct import dicom_headers
from covtanet.inference.predictor import Predictor, window_of
from covtanet.model.saved_model import load_model
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig, for_model

SIZE_PX, NUM_SLICES = 256, 105


def measure() -> list[Result]:
    """(c) the job against the plain loop and (e) its memory at 24 and at 96 series."""
    small = archive(24, SIZE_PX, NUM_SLICES)
    large = archive(96, SIZE_PX, NUM_SLICES)
    say("plain loop over 96 series")
    loop_s = seconds(lambda: plain_loop(large))
    say(f"plain loop: {loop_s:.0f} s; the job at 96 and at 24 series")
    run = run_job(large)
    at_96 = run.memory.peak_bytes()
    at_24 = run_job(small).memory.peak_bytes()
    name = f"the job over the plain loop, 96 series ({loop_s:.0f} s by the loop)"
    growth = f"{at_96 / at_24:.2f} x"
    return [
        Result("c", name, f"{run.spent_s / loop_s:.2f} x", "<= 1.15 x"),
        Result("e", "peak memory of all processes, 96 over 24 series", growth, "<= 1.1 x"),
        Result("e", "peak memory of all processes at 96 series", f"{at_96 / 1e9:.1f} GB"),
    ]


def plain_loop(folder: Path) -> None:
    """Run the job's stages in this process, one series after the other, without Ray."""
    model = load_model(model_folder())
    config = for_model(ScreeningConfig(), model.preprocessing, model.readout)
    window = window_of(model)
    predictor = Predictor(model, num_threads=CORES)
    decoder = stages.in_process(window, config)

    def read(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(f"{folder}/{path}", num_bytes)

    for prefix, objects in storage.walk(str(folder)):
        series, _ = manifest.scan_folder(prefix, objects, read, dicom_headers.read_identities)
        for row in series:
            prepared = stages.prepare_series(
                row.to_row(), archive=str(folder), window=window, config=config, decoder=decoder
            )
            predicted = stages.predict_series(prepared, predictor)
            stages.measure_series(predicted, window, config)

"""The screening that a user would write: one process, one series after the other.

python plain_loop.py ARCHIVE MODEL THREADS

SimpleITK reads a series, the lungs are found and the lesions measured by the code of an earlier
commit (``benchmarks.real_size`` sets PYTHONPATH to it), eager PyTorch in float32 runs the network.
It is the yardstick of the screening job and is not made faster. Prints a line of JSON per series.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK
import torch

from covtanet.ct.lung import find_lungs, measure_involvement
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.ct.window import box_of, pixel_aspect, thin_slices, to_input
from covtanet.inference.lesion_mask import lesion_in_source
from covtanet.inference.predictor import Predictor, window_of
from covtanet.model.saved_model import load_model


def main(archive: Path, model_folder: Path, num_threads: int) -> None:
    """Screen the series of an archive, one folder each."""
    torch.set_num_threads(num_threads)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(num_threads)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    model = load_model(model_folder)
    predictor = Predictor(model, engine="eager", num_threads=num_threads)
    window = window_of(model)
    for folder in sorted(path for path in archive.iterdir() if path.is_dir()):
        started, cpu_started = time.time(), time.process_time()
        image = read_series(folder)
        x, y, z = image.GetSpacing()
        volume = as_volume(image)
        hu = volume.hu
        lungs = find_lungs(volume)
        lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
        chosen, _ = thin_slices(lung_slices, z, model.preprocessing.slice_step_mm or 0.0)
        aspect = pixel_aspect((z, y, x))
        box = box_of(lungs.lung_mask, window, aspect)
        prediction = predictor.predict(to_input(hu[chosen], window, aspect, box))
        lesion_mask, _ = lesion_in_source(
            prediction.lesion_levels,
            chosen.astype(np.int64),
            lungs,
            (z, y, x),
            window,
            model.readout.lesion_threshold,
        )
        measured = measure_involvement(lungs, lesion_mask, x * y * z / 1000.0)
        row = {
            "series": folder.name,
            "involvement": measured.involvement,
            "lesion_volume_ml": measured.lesion_volume_ml,
            "lung_volume_ml": measured.lung_volume_ml,
            "started": started,
            "spent_s": time.time() - started,
            "cpu_s": time.process_time() - cpu_started,
        }
        print(json.dumps(row), flush=True)


def read_series(folder: Path) -> SimpleITK.Image:
    """Return the CT of a folder that holds one series."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def as_volume(image: SimpleITK.Image) -> Volume:
    """Return an image as a volume in HU."""
    affine = np.eye(4)
    # Columns for z, y, x: SimpleITK counts x first.
    direction = np.array(image.GetDirection()).reshape(3, 3)[:, ::-1]
    affine[:3, :3] = direction * np.array(image.GetSpacing())[::-1]
    affine[:3, 3] = image.GetOrigin()
    return canonical_volume(SimpleITK.GetArrayFromImage(image).astype(np.int16), affine)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

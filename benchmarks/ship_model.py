"""Make a model that screens from weights of train_gpu.py.

python -m benchmarks.ship_model --weights FILE --out FOLDER [--burden INTERCEPT SLOPE]
    [--trained-on VOLUME ..]

--weights: v8-final of train_gpu.py, TA-SegNet V8 alone. --burden: coefficients of the diagnosis
from the involvement. --trained-on: volumes of the training, which an evaluation then counts as
seen. The diagnosis of the network stays untrained and is switched off. The model runs in float32;
`covtanet calibrate` adds the engines below it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu_data import WINDOW
from benchmarks.gpu_networks import Scale, networks
from benchmarks.gpu_trial import THRESHOLD
from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import BurdenDiagnosis, Capabilities, Preprocessing, Readout
from covtanet.model.model_files import file_sha256
from covtanet.model.saved_model import SavedModel, save_model

SLICE_STEP_MM = 2.5


def saved_model(
    weights: Path, burden: BurdenDiagnosis | None, volumes: Sequence[Path]
) -> SavedModel:
    """Return the model of these weights, with the preprocessing of its training."""
    scale = Scale()
    segnet = networks(scale)["V8"].segnet
    # The small classifier: it is never trained, and the file stays below 25 MB.
    config = replace(SIZES["small"], segnet=segnet)
    torch.manual_seed(0)
    network = CovTANet(config)
    state = {name: value.float() for name, value in load_file(weights).items()}
    # Counts of batches are whole numbers, and of another type than the rest.
    for name, value in network.segnet.state_dict().items():
        state[name] = state.get(name, value).to(value.dtype)
    network.segnet.load_state_dict(state)
    return SavedModel(
        network=network.eval().requires_grad_(False),
        preprocessing=Preprocessing(
            low_hu=WINDOW.low_hu,
            high_hu=WINDOW.high_hu,
            size_px=scale.size_px,
            slice_step_mm=SLICE_STEP_MM,
            crops_to_lungs=True,
            num_neighbours=1,
        ),
        capabilities=Capabilities(segments=True, diagnoses=False),
        readout=Readout(lesion_threshold=THRESHOLD, burden=burden),
        provenance={
            "network": "V8",
            "recipe": "benchmarks/train_gpu.py",
            "training_weights_sha256": file_sha256(weights),
            "num_volumes": len(volumes),
            # As a training keeps them, see ``model_evaluation.seen_sources``.
            "seen_sources": sorted(file_sha256(volume)[:16] for volume in volumes),
        },
    )


def main() -> int:
    """Write the model and print its digest."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--burden", type=float, nargs=2)
    options.add_argument("--trained-on", type=Path, nargs="+", default=[])
    arguments = options.parse_args()
    burden = None
    if arguments.burden:
        intercept, slope = arguments.burden
        burden = BurdenDiagnosis(intercept=intercept, slope=slope)
    print(save_model(arguments.out, saved_model(arguments.weights, burden, arguments.trained_on)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

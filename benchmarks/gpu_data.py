"""Prepare the slices and the ImageNet weights that train_gpu.py reads.

python -m benchmarks.gpu_data --coronacases DIR --slices DIR --out DIR

--coronacases: a folder with nifti/NAME-hu.nii.gz in HU, and with masks of the same name plus
_lung-infection in nifti-masks/.
--slices: a folder with images/ and infection/ of single slices (COVID-SemiSeg).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from covtanet.ct import nifti
from covtanet.ct.lung import find_lungs
from covtanet.ct.lung_box import SliceBox, lung_box
from covtanet.ct.window import WindowConfig
from covtanet.data.pictures import join
from covtanet.data.slice_file import SliceFile, save_slices, to_grey
from covtanet.model.encoder import HEAD, packaged_state

WINDOW = WindowConfig(low_hu=-1250.0, high_hu=250.0)
LESION = 2
# Slices beyond the lungs, which are neighbours in z only.
NEIGHBOURS = 4
# Context on each side of the box over its width, for shifts and rotations. More makes the files
# larger than they need be.
CONTEXT_SHARE = 0.06
PICTURE_PX = 240
CANVAS_PX = 256
ENCODER = "tf_efficientnet_lite0"


def volume_slices(image: Path, mask: Path) -> SliceFile:
    """Return the slices of a volume in HU, cropped by the lung mask that screening computes."""
    volume = nifti.read(image.read_bytes())
    lesion: NDArray[np.bool_] = np.isin(nifti.read_labels(mask.read_bytes()), LESION)
    lungs = find_lungs(volume)
    has_lung: NDArray[np.bool_] = np.any(lungs.lung_mask, axis=(1, 2))
    if lesion[~has_lung].any():
        raise ValueError(f"{image.name} has lesions on slices without lung")
    shown = np.flatnonzero(has_lung)
    rows = slice(max(0, shown[0] - NEIGHBOURS), shown[-1] + 1 + NEIGHBOURS)
    return SliceFile(
        grey=to_grey(volume.hu[rows], WINDOW),
        lesion=lesion[rows],
        inside=(lungs.lung_mask | lungs.cavity_mask)[rows],
        has_lung=has_lung[rows],
        box=lung_box(lungs.lung_mask),
    )


def picture_slices(folder: Path) -> SliceFile:
    """Return single slices, which their source cropped to the lungs, with a black margin."""
    grey, lesion = join(folder / "images", folder / "infection", PICTURE_PX, 1)
    edge = (CANVAS_PX - PICTURE_PX) // 2
    margin = ((0, 0), (edge, edge), (edge, edge))
    return SliceFile(
        # Their window is unknown; black and white are taken as the ends of WINDOW.
        grey=np.pad(to_grey(grey, WindowConfig(low_hu=0, high_hu=255)), margin),
        lesion=np.pad(lesion > 0, margin),
        inside=np.ones((len(grey), CANVAS_PX, CANVAS_PX), bool),
        has_lung=np.ones(len(grey), bool),
        box=SliceBox(top=edge, left=edge, height=PICTURE_PX, width=PICTURE_PX),
        is_continuous=False,
    )


def encoder_weights(path: Path) -> None:
    """Write ImageNet weights by timm's names, with convolutions in half precision."""
    state = packaged_state(ENCODER)
    if state is None:
        raise ValueError(f"no package with the weights of {ENCODER}")
    stored = {}
    for name, value in state.items():
        if not name.startswith(HEAD):
            narrow = value.half() if value.ndim == 4 else value
            stored[name] = narrow.contiguous()
    save_file(stored, path)


def main() -> int:
    """Write one file per series and the encoder's weights."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--coronacases", type=Path, required=True)
    options.add_argument("--slices", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    encoder_weights(arguments.out / f"{ENCODER}.safetensors")
    masks = arguments.coronacases / "nifti-masks"
    prepared = {"slices": picture_slices(arguments.slices)}
    for image in sorted((arguments.coronacases / "nifti").glob("*-hu.nii.gz")):
        name = image.name.removesuffix(".nii.gz")
        prepared[name.removesuffix("-hu")] = volume_slices(
            image, masks / f"{name}_lung-infection.nii.gz"
        )
    for name, slices in prepared.items():
        context_px = round(CONTEXT_SHARE * slices.box.width)
        save_slices(arguments.out / f"{name}.npz", slices, context_px)
        size = (arguments.out / f"{name}.npz").stat().st_size
        print(f"{name}: {len(slices.grey)} slices, box {slices.box}, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

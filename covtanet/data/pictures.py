"""python -m covtanet.data.pictures: join 2D slices and their masks into a stack and its mask.

PNG or JPEG of grey values, such as COVID-SemiSeg's 50 slices; a mask has its slice's name, and
lesion is brighter than half. ``stacks`` reads the result, and counts it as one patient, whatever
number of patients it was joined from. With ``--hu`` the stack holds HU by a linear window.
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from covtanet.ct.volume import LPS_TO_RAS
from covtanet.data.stacks import HU_SUFFIX
from covtanet.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg")
HALF = 127  # of 255


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Return the grey values of a picture (H, W).

    Raises:
        ConfigError: the file is not a picture.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(
            f"{path.name} cannot be read as a picture, expected PNG or JPEG"
        ) from error


def to_square(grey: NDArray[np.uint8], side_px: int, quarter_turns: int) -> NDArray[np.uint8]:
    """Return a picture (H, W) turned counterclockwise and padded by black to a square."""
    grey = np.rot90(grey, quarter_turns)
    height, width = grey.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    # Padded before the resize, so that pixels stay square.
    square = np.pad(grey, ((top, side - height - top), (left, side - width - left)))
    return np.asarray(Image.fromarray(square).resize((side_px, side_px), Image.Resampling.BOX))


def join(
    images: Path, masks: Path, side_px: int = 256, quarter_turns: int = 0
) -> tuple[NDArray[np.uint8], ...]:
    """Return grey values and lesion masks (0, 1), (S, H, W), of the slices that have a mask.

    Raises:
        ConfigError: no slice has a mask, a file is not a picture, a mask is not of its slice's
            size, or no mask marks a lesion, such as masks of labels instead of black and white.
    """
    by_name = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in SUFFIXES}
    paths = sorted(
        path
        for path in images.iterdir()
        if path.suffix.lower() in SUFFIXES and path.stem in by_name
    )
    if not paths:
        raise ConfigError(
            f"no slice has a mask of its name; expected {' or '.join(SUFFIXES)} in both folders"
        )
    slices, lesions = [], []
    for path in paths:
        grey, mask = read_grey(path), read_grey(by_name[path.stem])
        if grey.shape != mask.shape:
            raise ConfigError(
                f"the mask of {path.name} has {mask.shape} pixels, expected {grey.shape}"
            )
        slices.append(to_square(grey, side_px, quarter_turns))
        # Averaged by the resize: a pixel is lesion if more than half of it is.
        lesions.append(to_square(mask, side_px, quarter_turns) > HALF)
    if not np.any(lesions):
        raise ConfigError(f"no mask has anything brighter than {HALF}, expected lesion in white")
    return np.stack(slices), np.stack(lesions).astype(np.uint8)


def to_hu(grey: NDArray[np.uint8], low_hu: float, high_hu: float) -> NDArray[np.int16]:
    """Return the HU of grey values, of which 0 and 255 are the ends of a linear window."""
    hu: NDArray[np.int16] = np.rint(low_hu + grey * ((high_hu - low_hu) / 255)).astype(np.int16)
    return hu


def write_stack(path: Path, slices: NDArray[np.uint8] | NDArray[np.int16]) -> None:
    """Write slices (S, H, W) as NIfTI: the spine at the bottom, the spacing without a unit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # (S, y, x) -> (x, y, S), the order of NIfTI.
    nib.Nifti1Image(slices.transpose(2, 1, 0), LPS_TO_RAS).to_filename(path)


def main() -> int:
    """Write OUT/nifti/NAME.nii.gz and OUT/nifti-masks/NAME_mask.nii.gz."""
    options = argparse.ArgumentParser(prog="python -m covtanet.data.pictures", description=__doc__)
    options.add_argument("--images", type=Path, required=True)
    options.add_argument("--masks", type=Path, required=True)
    options.add_argument(
        "--out", type=Path, required=True, help="a data set of stacks, new or with others in it"
    )
    options.add_argument("--name", default="slices")
    options.add_argument("--size-px", type=int, default=256)
    options.add_argument(
        "--quarter-turns", type=int, default=0, help="counterclockwise; COVID-SemiSeg wants 1"
    )
    options.add_argument(
        "--hu", type=float, nargs=2, metavar=("LOW", "HIGH"), help="HU of black and of white"
    )
    arguments = options.parse_args()
    if arguments.hu and arguments.hu[0] >= arguments.hu[1]:
        options.error(f"--hu {arguments.hu[0]:g} {arguments.hu[1]:g}, expected LOW below HIGH")
    try:
        grey, lesion = join(
            arguments.images, arguments.masks, arguments.size_px, arguments.quarter_turns
        )
    except (ConfigError, OSError) as error:
        print(f"cannot join: {error}", file=sys.stderr)
        return 2
    name = arguments.name
    stack: NDArray[np.uint8] | NDArray[np.int16] = grey
    if arguments.hu:
        name = f"{name}{HU_SUFFIX}"
        stack = to_hu(grey, *arguments.hu)
    write_stack(arguments.out / "nifti" / f"{name}.nii.gz", stack)
    write_stack(arguments.out / "nifti-masks" / f"{name}_mask.nii.gz", lesion)
    print(f"joined {len(grey)} slices, {int(lesion.any(axis=(1, 2)).sum())} of them with lesion")
    return 0


if __name__ == "__main__":
    sys.exit(main())

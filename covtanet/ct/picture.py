"""One axial slice as a JPEG or PNG of grey values, to a volume of one slice in HU.

Rows run to the patient's back and columns to the left, as radiologists look at a slice. The voxel
size is unknown.
"""

import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from covtanet.ct.hounsfield import INT16_RANGE, check_hu
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.errors import Reason, StudyError

SUFFIXES = (".jpg", ".jpeg", ".png")
# Index (z, y, x) -> LPS mm: x to the left, y to the back, z to the head, nominal lengths.
AFFINE = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
# A bit more than the largest CT matrix. Pillow warns from half of it on, and refuses twice as many.
MAX_PIXELS = 4096 * 4096


def read_grey(data: bytes) -> NDArray[np.uint8]:
    """Return the grey values of a picture, (1, y, x).

    Raises:
        StudyError: ``unreadable`` if it is no picture, ``too_large`` or ``undecodable``.
    """
    try:
        with warnings.catch_warnings():
            # The size is checked here, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=("JPEG", "PNG")) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise StudyError(
                        Reason.TOO_LARGE,
                        f"{picture.width} x {picture.height} pixels, expected at most {MAX_PIXELS}",
                    )
                return np.asarray(picture.convert("L"))[None]
    except Image.DecompressionBombError as error:
        raise StudyError(Reason.TOO_LARGE, "the picture has too many pixels") from error
    except UnidentifiedImageError as error:
        raise StudyError(Reason.UNREADABLE, "neither JPEG nor PNG") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise StudyError(Reason.UNDECODABLE, f"the picture: {type(error).__name__}") from error


def read(data: bytes, hu_at_0: float, hu_per_grey: float) -> Volume:
    """Read one slice whose HU are ``hu_at_0 + grey * hu_per_grey``.

    Raises:
        StudyError: as ``read_grey`` does, or ``not_hu`` if the values cannot be HU.
    """
    values = hu_at_0 + read_grey(data).astype(np.float32) * hu_per_grey
    hu = np.clip(np.rint(values), INT16_RANGE.min, INT16_RANGE.max).astype(np.int16)
    check_hu(hu)
    volume = canonical_volume(hu, AFFINE)
    return Volume(hu=volume.hu, affine=volume.affine, source=volume.source, has_known_spacing=False)

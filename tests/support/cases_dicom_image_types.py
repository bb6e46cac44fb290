"""Cases of DICOM image types: projections and averages."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from chests import chest, datasets, enhanced, save
from right_rows import SCREENED, Case, Right, Row, refused
from scipy import ndimage

# 09: projections


def of_image_type(
    folder: Path,
    name: str,
    *,
    image_type: Sequence[str],
    row: Row,
    is_enhanced: bool = False,
) -> Right:
    """Write slabs of three slices, which their ImageType names."""
    slab = ndimage.uniform_filter1d if row.status == SCREENED else ndimage.maximum_filter1d
    series = datasets(name, replace(chest(), hu=slab(chest().hu, 3, axis=0)))
    for dataset in series:
        dataset.ImageType = list(image_type)
    save(folder, [enhanced(series)] if is_enhanced else series)
    return Right(rows=(row,))


def cases() -> Iterator[tuple[str, Case]]:
    """Yield the cases by their names."""
    for word in ("MIP", "MINIP", "MIN_IP", "MAX_IP", "MAXIMUM", "MINIMUM", "CSA MIP"):
        image_type = ("DERIVED", "SECONDARY", "AXIAL", word)
        yield (
            f"09_{word.replace(' ', '_')}",
            partial(of_image_type, image_type=image_type, row=refused("projection")),
        )
    third = ("DERIVED", "SECONDARY", "MIP")
    yield "09_MIP_third", partial(of_image_type, image_type=third, row=refused("projection"))
    for word in ("MAXIMUM", "MINIMUM"):
        image_type = ("DERIVED", "PRIMARY", "VOLUME", word)
        yield (
            f"09_enhanced_{word}",
            partial(
                of_image_type,
                image_type=image_type,
                row=refused("projection"),
                is_enhanced=True,
            ),
        )
    for word in ("AVERAGE", "MEAN"):
        image_type = ("DERIVED", "SECONDARY", "AXIAL", word)
        yield (
            f"09_{word}",
            partial(of_image_type, image_type=image_type, row=Row(flags=("reformatted",))),
        )

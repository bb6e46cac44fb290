"""Bodies of any size, and of unknown size."""

from dataclasses import replace

import numpy as np
import pytest
from cut_chests import found_in, share
from wide_chests import averaged, chest

from covtanet.ct import lung
from covtanet.ct.volume import canonical_volume
from covtanet.errors import StudyError


def test_newborn_is_measured_at_its_own_scale() -> None:
    """The phantom at 0.29 of its size: 10 cm wide, lungs of 90 ml, 18 cm2 in the largest slice."""
    lungs = found_in(chest().hu, chest(), scale=0.29)
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


def test_newborn_without_lung_is_refused() -> None:
    hu = chest().hu.copy()
    hu[chest().lung_mask] = 40
    with pytest.raises(StudyError, match="cm2 of lung, expected 4") as error:
        found_in(hu, chest(), scale=0.29)
    assert error.value.reason == "no_lung"


@pytest.mark.parametrize(("size_px", "num_slices"), [(128, 30), (128, 108), (256, 30)])
def test_unknown_spacing_is_guessed_from_the_size_of_the_body(
    size_px: int, num_slices: int
) -> None:
    phantom = chest(size_px, num_slices)
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    lungs = lung.find_lungs(replace(canonical_volume(phantom.hu, affine), has_known_spacing=False))
    assert not lungs.is_partial
    assert share(lungs, phantom.lung_mask) == pytest.approx(1, abs=0.05)


def test_unknown_spacing_ignores_lengths_of_the_header() -> None:
    """The same voxels with any nominal size give the same masks."""
    one, other = (
        found_in(chest().hu, chest(), scale=scale, is_known=False) for scale in (0.01, 100)
    )
    np.testing.assert_array_equal(one.lung_mask, other.lung_mask)
    assert not one.is_partial


def test_unknown_spacing_without_lung_or_with_cut_lungs_is_reported() -> None:
    hu = chest().hu.copy()
    hu[chest().lung_mask] = 40
    with pytest.raises(StudyError, match="% of the body, expected 3 %") as error:
        found_in(hu, chest(), scale=0.1, is_known=False)
    assert error.value.reason == "no_lung"
    assert found_in(chest().hu[10:20], chest(), scale=0.1, is_known=False).is_partial
    assert found_in(chest().hu[:, :, 30:], chest(), scale=0.1, is_known=False).is_partial


@pytest.mark.parametrize(
    ("scale", "is_known", "is_implausible"),
    [
        (1.0, True, False),
        (0.29, True, False),
        (0.2, True, True),
        (1.6, True, True),
        (0.2, False, False),
    ],
)
def test_implausible_lung_volume_gives_null_involvement(
    scale: float, is_known: bool, is_implausible: bool
) -> None:
    """The lungs hold 3.6 litres at full size: 29 ml at a fifth of it, 15 litres at 1.6 times."""
    lungs = found_in(chest().hu, chest(), scale=scale, is_known=is_known)
    voxel_ml = 2.8 * 2.8 * 9 * scale**3 / 1000 if is_known else None
    measured = lung.measure_involvement(lungs, chest().lesion_mask, voxel_ml)
    assert measured.is_implausible is is_implausible
    assert (measured.involvement is None) is is_implausible
    assert (measured.lung_volume_ml is None) is not is_known
    assert (measured.lesion_volume_ml is None) is not is_known
    cut = replace(lungs, is_partial=True)
    assert not lung.measure_involvement(cut, chest().lesion_mask, voxel_ml).is_implausible


@pytest.mark.parametrize("factors", [(1, 1, 2), (1, 2, 1), (1, 4, 1), (1, 1, 4), (1, 6, 1)])
def test_lungs_of_anisotropic_pixels_equal_those_of_square_pixels(
    factors: tuple[int, int, int],
) -> None:
    """Reformats: up to 8.4 mm along one axis of the slice, 1.4 mm along the other."""
    phantom = chest(256, 60)
    hu, truth = (averaged(array, factors) for array in (phantom.hu, phantom.lung_mask))
    scaled = replace(phantom, affine=phantom.affine @ np.diag([*factors, 1]))
    lungs = found_in(np.rint(hu).astype(np.int16), scaled)
    assert not lungs.is_partial
    assert share(lungs, truth > 0.5) == pytest.approx(1, abs=0.1)

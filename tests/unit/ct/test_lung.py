"""Lungs of a volume, its lung slices, and involvement."""

import numpy as np
import pytest

from covtanet.ct import lung, nifti
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.ct.window import spread_slices, thin_slices
from covtanet.errors import StudyError
from covtanet.phantoms.damage import OTHER_DAMAGE
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom


def test_label_map_and_chest_without_lung_are_refused(mild: Phantom) -> None:
    with pytest.raises(StudyError, match="a label map") as error:
        nifti.read(OTHER_DAMAGE["label_map"](mild)[1])
    assert error.value.reason == "label_map"
    with pytest.raises(StudyError, match="cm2 of lung") as error:
        lung.find_lungs(nifti.read(OTHER_DAMAGE["no_lung"](mild)[1]))
    assert error.value.reason == "no_lung"


def test_thinned_slices_stand_for_all_lung_slices() -> None:
    chosen, extent_mm = thin_slices(np.arange(10, 110), 1.0, 2.5)
    assert (np.diff(chosen) == 3).all()
    assert extent_mm.sum() == 100


def test_thick_slices_are_all_segmented() -> None:
    chosen, extent_mm = thin_slices(np.arange(4, 30), 8.0, 2.5)
    assert chosen.tolist() == list(range(4, 30))
    assert set(extent_mm.tolist()) == {8.0}


def test_slices_spread_from_end_to_end() -> None:
    assert spread_slices(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread_slices(101, 3).tolist() == [0, 50, 100]
    assert spread_slices(1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("involvement", "consolidation"), [(0.0, 0.3), (0.1, 0.3), (0.3, 0.5), (0.6, 0.3), (0.6, 0.6)]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_involvement_is_within_three_hundredths_of_the_truth(
    involvement: float, consolidation: float, seed: int
) -> None:
    phantom = make_phantom(
        PhantomConfig(seed=seed, involvement=involvement, consolidation=consolidation)
    )
    volume = canonical_volume(phantom.hu, phantom.affine)
    lungs = lung.find_lungs(volume)
    measured = lung.measure_involvement(lungs, phantom.lesion_mask, volume.voxel_ml)
    assert not lungs.is_partial
    assert measured.involvement == pytest.approx(phantom.involvement, abs=0.03)


def test_lungs_cut_by_the_field_of_view_are_partial_and_have_null_involvement(
    mild: Phantom,
) -> None:
    volume = canonical_volume(mild.hu[8:18], mild.affine)
    lungs = lung.find_lungs(volume)
    assert lungs.is_partial
    assert (
        lung.measure_involvement(lungs, mild.lesion_mask[8:18], volume.voxel_ml).involvement is None
    )


def test_airways_are_not_lung(mild_volume: Volume, mild: Phantom) -> None:
    lungs = lung.find_lungs(mild_volume)
    trachea = (mild.hu < -950) & ~mild.lung_mask
    inside = trachea[:, 40:90, 55:75]
    assert inside.sum() > 50
    assert lungs.lung_mask[:, 40:90, 55:75][inside].mean() < 0.25


def test_phantoms_follow_from_their_seed() -> None:
    config = PhantomConfig(
        seed=3, involvement=0.2, size_px=64, num_slices=12, pixel_mm=5.6, slice_mm=18
    )
    one, same, other = (
        make_phantom(config),
        make_phantom(config),
        make_phantom(PhantomConfig(**{**vars(config), "seed": 4})),
    )
    np.testing.assert_array_equal(one.hu, same.hu)
    assert (one.hu != other.hu).any()
    assert one.involvement == pytest.approx(0.2, abs=0.01)

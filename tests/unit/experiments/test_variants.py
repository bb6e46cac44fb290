"""Networks that a command trains, by the truth that the data set has."""

from dataclasses import replace

import pytest

from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.experiments.variants import ablation_variants, change, network_variants
from covtanet.model.registry import CLASSIFIERS, SEGMENTERS
from covtanet.model.table_i import SWITCHES
from covtanet.training.config import TrainingConfig

CONFIG = TrainingConfig(size="tiny")
MASKED = PreparedVolume(
    key="a", volume_path="a", patient="a", intensity="hu", slices=(0,), lesion_px=(5,)
)
GRADED = replace(MASKED, key="b", lesion_px=None, diagnosis="infected", severity="mild")


def phases(variants: list[TrainingConfig]) -> dict[str, tuple[int, ...]]:
    return {variant.network: variant.phases for variant in variants}


def test_ablation_all_is_every_row_in_phase_1() -> None:
    assert phases(ablation_variants(CONFIG, "all")) == dict.fromkeys(SWITCHES, (1,))
    assert phases(ablation_variants(CONFIG, "V3")) == {"V3": (1,)}


def test_all_networks_follow_from_masks_and_grades() -> None:
    both = phases(network_variants(CONFIG, ["all"], [MASKED, GRADED]))
    assert both == {
        "V7": (1, 2),
        "V1": (1,),
        **dict.fromkeys(SEGMENTERS, (1,)),
        **dict.fromkeys(CLASSIFIERS, (2,)),
    }
    masks_alone = phases(network_variants(CONFIG, ["all"], [MASKED]))
    assert masks_alone == {"V7": (1,), "V1": (1,), **dict.fromkeys(SEGMENTERS, (1,))}
    grades_alone = phases(network_variants(CONFIG, ["all"], [GRADED]))
    assert grades_alone == dict.fromkeys(CLASSIFIERS, (2,))


def test_saved_segmenter_leaves_phase_1_out() -> None:
    config = replace(CONFIG, network="V8", phases=(2,), phase1_model="models/m")
    variants = network_variants(config, ["V8", "VGG-19"], [MASKED, GRADED])
    assert phases(variants) == {"V8": (2,), "VGG-19": (2,)}
    with pytest.raises(ValueError, match=r"phases of V8 are \[1, 2\], expected \[2\]"):
        replace(config, phases=(1, 2))


def test_phase_1_alone_leaves_classifiers_out() -> None:
    config = replace(CONFIG, phases=(1,))
    assert not set(CLASSIFIERS) & set(phases(network_variants(config, ["all"], [MASKED, GRADED])))


def test_networks_are_named_as_in_the_tables_and_trained_once() -> None:
    variants = network_variants(CONFIG, ["Unet", "TA-SegNet", "Unet"], [MASKED])
    assert phases(variants) == {"V1": (1,), "V7": (1,)}
    assert len(variants) == 2


def test_data_without_masks_and_grades_is_refused() -> None:
    volume = replace(MASKED, lesion_px=None)
    with pytest.raises(ConfigError, match="neither masks nor grades"):
        network_variants(CONFIG, ["all"], [volume])


def test_value_that_the_configuration_refuses_is_config_error() -> None:
    with pytest.raises(ConfigError, match=r"folds are \[9\], expected some of 0 \.\. 4"):
        change(CONFIG, folds=(9,))

"""The COVID-19 CT lung and infection segmentation data set (Ma et al., Zenodo 3757476).

The paper's Dataset-2: 20 volumes of 19 patients. Volumes from Radiopaedia were windowed to 0..255
at their source, by a line that is known; those of coronacases are HU. Severity follows from the
masks.
"""

import re

from covtanet import storage
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError

VOLUME = re.compile(r"(?P<folder>COVID-19-CT-Seg_20cases/)(?P<name>[^/]+)\.nii(\.gz)?")
LUNG, LESION = "Lung_Mask", "Infection_Mask"
# Radiopaedia's case 85902 holds two series of one person.
SAME_PATIENT = re.compile(r"(radiopaedia_\d+_\d+)_\d+")
# The line of its authors' benchmark: grey values 0..255 are -1250..250 HU.
RADIOPAEDIA_INTENSITY = "grey8:-1250:250"

NOTES = (
    "COVID-19-CT-Seg_20cases: CC BY-NC-SA by its authors' page. Weights trained on it are for "
    "non-commercial use.",
    "COVID-19-CT-Seg_20cases: radiopaedia_* are grey values 0..255 of a linear window of "
    "-1250..250 HU, and are read as HU; coronacases_* are HU.",
    "COVID-19-CT-Seg_20cases: 20 volumes of 19 patients; radiopaedia_10_85902_1 and _3 are one.",
)


def read(uri: str) -> list[LabelledVolume]:
    """Find the volumes with their lung and infection masks below a folder or s3:// prefix.

    Raises:
        ConfigError: no volume in this layout, or a missing mask.
    """
    paths = {item.path for _, objects in storage.walk(uri, leaves_root=True) for item in objects}
    matches = [VOLUME.fullmatch(path) for path in sorted(paths)]
    volumes = [_volume(match, paths) for match in matches if match]
    if not volumes:
        raise ConfigError(
            "no COVID-19-CT-Seg_20cases/*.nii.gz in the data set's folder, expected the "
            "Zenodo layout"
        )
    return volumes


def _volume(match: re.Match[str], paths: set[str]) -> LabelledVolume:
    name = match["name"]
    masks = {}
    for folder in (LUNG, LESION):
        masks[folder] = match[0].replace(match["folder"], f"{folder}/", 1)
        if masks[folder] not in paths:
            raise ConfigError(f"{name} has no mask in {folder}")
    same_patient = SAME_PATIENT.fullmatch(name)
    return LabelledVolume(
        volume_path=match[0],
        patient=same_patient[1] if same_patient else name,
        lesion_mask_path=masks[LESION],
        lung_mask_path=masks[LUNG],
        intensity=RADIOPAEDIA_INTENSITY if name.startswith("radiopaedia") else "hu",
    )

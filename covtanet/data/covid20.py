"""The COVID-19 CT lung and infection segmentation data set (Ma et al., Zenodo 3757476): 20 volumes of 19 patients.

The paper's Dataset-2. Volumes from Radiopaedia were windowed to 0..255 at their source; those of coronacases are HU.
Severity follows from the masks.
"""

import re

from covtanet import storage
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError

VOLUME = re.compile(r"(?P<folder>COVID-19-CT-Seg_20cases/)(?P<name>[^/]+)\.nii(\.gz)?")
LUNG, LESION = "Lung_Mask", "Infection_Mask"
# Radiopaedia's case 85902 holds two series of one person.
SAME_PATIENT = re.compile(r"(radiopaedia_\d+_\d+)_\d+")

NOTES = (
    "COVID-19-CT-Seg_20cases: CC BY-NC-SA by its authors' page. Weights trained on it are for non-commercial use.",
    "COVID-19-CT-Seg_20cases: radiopaedia_* are grey values 0..255, windowed at their source; coronacases_* are HU.",
    "COVID-19-CT-Seg_20cases: 20 volumes of 19 patients; radiopaedia_10_85902_1 and _3 are one.",
)


def read(uri: str) -> list[LabelledVolume]:
    """Find the volumes with their lung and infection masks below a folder or s3:// prefix.

    Raises:
        ConfigError: where there is no volume in this layout, or a mask is missing.
    """
    paths = {item.path for _, objects in storage.walk(uri, leaves_root=True) for item in objects}
    volumes = []
    for path in sorted(paths):
        if not (match := VOLUME.fullmatch(path)):
            continue
        masks = {
            folder: path.replace(match["folder"], f"{folder}/", 1) for folder in (LUNG, LESION)
        }
        for folder, mask in masks.items():
            if mask not in paths:
                raise ConfigError(f"{match['name']} has no mask in {folder}")
        is_grey = match["name"].startswith("radiopaedia")
        same = SAME_PATIENT.fullmatch(match["name"])
        volumes.append(
            LabelledVolume(
                volume_path=path,
                patient=same[1] if same else match["name"],
                lesion_mask_path=masks[LESION],
                lung_mask_path=masks[LUNG],
                intensity="grey8" if is_grey else "hu",
            )
        )
    if not volumes:
        raise ConfigError(
            "no COVID-19-CT-Seg_20cases/*.nii.gz below the data's place, expected the Zenodo layout"
        )
    return volumes

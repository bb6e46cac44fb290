"""MosMedData (Morozov et al. 2020) as distributed: ``studies/CT-0`` .. ``CT-4`` and ``masks``.

1110 studies of as many people: 254 CT-0, 684 CT-1, 125 CT-2, 45 CT-3, 2 CT-4. The paper's classes
are normal (CT-0), mild (CT-1, up to a quarter of the lung) and severe (CT-2 and above). Licence
CC BY-NC-ND 3.0.
"""

import re

from covtanet import storage
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError

STUDY = re.compile(r"studies/CT-(?P<grade>[0-4])/(?P<name>study_\d+)\.nii(\.gz)?")
MASK = re.compile(r"masks/(?P<name>study_\d+)_mask\.nii(\.gz)?")
LABELS = {0: ("normal", None), 1: ("infected", "mild")}
SEVERE = ("infected", "severe")

NOTES = (
    "MosMedData: CC BY-NC-ND 3.0. Neither the data nor volumes made from it may be passed on; "
    "weights trained on it are for non-commercial use.",
    "MosMedData: every lesion mask is of grade CT-1, so the segmentation never sees a severe case.",
)


def read(uri: str) -> list[LabelledVolume]:
    """Find the studies and their masks below a folder or s3:// prefix.

    Raises:
        ConfigError: no study in this layout.
    """
    paths = [item.path for _, objects in storage.walk(uri, leaves_root=True) for item in objects]
    masks = {match["name"]: path for path in paths if (match := MASK.fullmatch(path))}
    volumes = []
    for path in sorted(paths):
        if match := STUDY.fullmatch(path):
            diagnosis, severity = LABELS.get(int(match["grade"]), SEVERE)
            volumes.append(
                LabelledVolume(
                    volume_path=path,
                    patient=match["name"],
                    lesion_mask_path=masks.get(match["name"]),
                    diagnosis=diagnosis,
                    severity=severity,
                )
            )
    if not volumes:
        raise ConfigError(
            "no studies/CT-0 .. CT-4/study_NNNN.nii.gz in the data set's folder, expected "
            "MosMedData's layout"
        )
    return volumes

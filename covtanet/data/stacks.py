"""Image-and-mask stacks: NIfTI images of grey values 0..255 with stacks of labels.

A mask is the image's name with ``_lung-infection`` or ``_mask``. Stacks hold labels 0 background,
1 lung, 2 lesion; ``_mask`` files hold the lesion alone. One stack counts as one patient. Severity
follows from the masks.
"""

import re
from dataclasses import replace

from covtanet import storage
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError

IMAGE = re.compile(r"(?P<name>[^/]+)\.nii(\.gz)?")
NOTES = (
    "Stacks: grey values 0..255, windowed at their source: a model trained on them has not seen "
    "HU.",
    "Stacks: slices without a lesion may have been left out at the source, so involvement is that "
    "of the slices in the stack.",
    "Stacks: one stack counts as one patient, whatever scans it was joined from; spacing may be "
    "unknown.",
)


def read(uri: str) -> list[LabelledVolume]:
    """Find stacks in ``nifti`` with masks in ``nifti-masks`` below a folder or s3:// prefix."""
    root = f"{storage.absolute(uri)}/"
    return [
        replace(
            volume,
            volume_path=volume.volume_path.removeprefix(root),
            lesion_mask_path=_below(root, volume.lesion_mask_path),
            lung_mask_path=_below(root, volume.lung_mask_path),
        )
        for volume in pair(storage.join(uri, "nifti"), storage.join(uri, "nifti-masks"), "grey8")
    ]


def _below(root: str, path: str | None) -> str | None:
    return None if path is None else path.removeprefix(root)


def pair(images: str, masks: str, intensity: str = "auto") -> list[LabelledVolume]:
    """Return the images that have a mask. Their paths are absolute.

    Raises:
        ConfigError: no image has a mask.
    """
    images, masks = storage.absolute(images), storage.absolute(masks)
    names = set(storage.list_names(masks))
    volumes = []
    for image in storage.list_names(images):
        if not (match := IMAGE.fullmatch(image)):
            continue
        suffix = image.removeprefix(match["name"])
        stack, mask = f"{match['name']}_lung-infection{suffix}", f"{match['name']}_mask{suffix}"
        if stack not in names and mask not in names:
            continue
        has_lung = stack in names
        path = storage.join(masks, stack if has_lung else mask)
        volumes.append(
            LabelledVolume(
                volume_path=storage.join(images, image),
                patient=match["name"],
                lesion_mask_path=path,
                lung_mask_path=path if has_lung else None,
                lesion_labels="2" if has_lung else "",
                lung_labels="1 2" if has_lung else "",
                intensity=intensity,
            )
        )
    if not volumes:
        raise ConfigError("no image has a mask named after it with _lung-infection or _mask")
    return volumes

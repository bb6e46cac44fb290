"""Image-and-mask stacks: NIfTI images of grey values 0..255 with stacks of labels.

A mask is the image's name with ``_lung-infection`` or ``_mask``. Stacks hold labels 0 background,
1 lung, 2 lesion; ``_mask`` files hold the lesion alone. One stack counts as one patient. Severity
follows from the masks. An image whose name ends in ``-hu`` holds HU: its lungs are then found as in
screening, since labelled lungs may be missing on slices without lesion. An image named ``slices``
or NAME-slices, with or without ``-hu``, holds single slices, which are not neighbours.
"""

import re
from dataclasses import replace

from covtanet import storage
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError

IMAGE = re.compile(r"(?P<name>[^/]+)\.nii(\.gz)?")
HU_SUFFIX = "-hu"
SINGLE = "slices"
NOTES = (
    "Stacks: grey values 0..255, windowed at their source: a model trained on them alone has not "
    "seen HU. NAME-hu holds HU.",
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
        path = storage.join(masks, stack if stack in names else mask)
        volumes.append(
            _volume(match["name"], storage.join(images, image), path, stack in names, intensity)
        )
    if not volumes:
        raise ConfigError("no image has a mask named after it with _lung-infection or _mask")
    return volumes


def _volume(name: str, image: str, mask: str, has_labels: bool, intensity: str) -> LabelledVolume:
    """Return one stack. has_labels: the mask tells lungs and lesions apart."""
    is_hu = name.endswith(HU_SUFFIX)
    has_lung = has_labels and not is_hu
    patient = name.removesuffix(HU_SUFFIX)
    is_single = patient == SINGLE or patient.endswith(f"-{SINGLE}")
    return LabelledVolume(
        volume_path=image,
        patient=patient,
        lesion_mask_path=mask,
        lung_mask_path=mask if has_lung else None,
        lesion_labels="2" if has_labels else "",
        lung_labels="1 2" if has_lung else "",
        intensity="hu" if is_hu else intensity,
        slice_order="single" if is_single else "continuous",
    )

"""The kind of CT image that an object is: a localizer, a projection, or computed from other slices.

By ImageType (vendors choose its values from the third on, PS3.3 C.8.2.1.1.1), by the
attributes of an Enhanced CT's frames (PS3.3 C.8.16.2) and by the codes of a derivation (CID 7203).
DERIVED and SECONDARY say nothing by themselves: anonymizers and compressors write them.

Not covered: free text, as in SeriesDescription.
"""

import re
from collections.abc import Sequence
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from covtanet.ct.dicom_objects import read_text
from covtanet.ct.dicom_values import value_of

LOCALIZER = re.compile(
    r"\b(LOCALI[SZ]ERS?|SCOUT|SCANOGRAM|TOPOGRAM|SURVIEW|SCANOSCOPE|CT SOM\d TOP)\b"
)
# CSA MIP, MIP_SAG, MIN_IP; renderings; curved reformats, with pixels that do not lie in a plane.
PROJECTION = re.compile(
    r"\b(\w*MIPS?\d*|MINIP|MAXIP|M(AX|IN) IP|MAXIMUM|MINIMUM|CPR|CURVED|VOLREN|VRT|SSD"
    r"|(VOLUME|SURFACE) RENDER(ING|ED)?)\b|^(MAX|MIN)$"
)
ANY_PROJECTION = re.compile(r"(?<!\bBACK )\b(PROJECTION|PJN)\b")
AVERAGE = re.compile(r"\b(AVERAGED?|AVG|AVE|MEAN|AVG? ?IP|AIP|RAY ?SUM|THICK)\b")
REFORMATTED = re.compile(r"\b((CSA ?)?MPR|MPVR|REFORMAT(TED)?|RESAMPLED|MULTI ?PLANAR)\b")

PROJECTION_TECHNIQUES = {"MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"}
REFORMATTED_TECHNIQUES = {"MPR"}
# Codes of DCM: pixel by pixel maximum and minimum, curved reformat, volume and surface rendering,
# MIP and MinIP.
PROJECTION_CODES = {"113048", "113051", "113073", "113074", "113075", "113078", "113079"}
REFORMATTED_CODES = {"113049", "113072"}  # pixel by pixel mean, multiplanar reformat


def is_localizer(header: Dataset) -> bool:
    """Return whether the object is an overview image, from which slices are planned."""
    return _any_matches(LOCALIZER, _image_type(header))


def is_localizer_type(image_type: Sequence[str]) -> bool:
    """Return whether the values of an ImageType are those of an overview image."""
    return _any_matches(LOCALIZER, _as_words(image_type))


def is_projection(header: Dataset) -> bool:
    """Return whether pixels are extremes of many or of a rendering, which make no volume."""
    values = _image_type(header)
    if _any_matches(PROJECTION, values) or _technique(header) in PROJECTION_TECHNIQUES:
        return True
    if _text(header, "VolumetricProperties") == "DISTORTED":
        return True
    if _derivation_codes(header) & PROJECTION_CODES:
        return True
    return _any_matches(ANY_PROJECTION, values) and not _any_matches(AVERAGE, values)


def is_reformatted(header: Dataset) -> bool:
    """Return whether slices were computed from others: in another plane, or as an average."""
    values = _image_type(header)
    if _any_matches(AVERAGE, values) or _any_matches(REFORMATTED, values):
        return True
    if _text(header, "VolumetricProperties") == "SAMPLED":
        return True
    if _technique(header) in REFORMATTED_TECHNIQUES:
        return True
    return bool(_derivation_codes(header) & REFORMATTED_CODES)


def _any_matches(pattern: re.Pattern[str], values: list[str]) -> bool:
    return any(pattern.search(value) for value in values)


def _image_type(header: Dataset) -> list[str]:
    """Return the values of ImageType in capitals; other characters become one blank."""
    value: Any = value_of(header, "ImageType") or []
    return _as_words([value] if isinstance(value, str) else list(value))


def _as_words(values: Sequence[object]) -> list[str]:
    return [" ".join(re.findall(r"[A-Z0-9]+", str(text).upper())) for text in values]


def _text(header: Dataset, name: str) -> str:
    return read_text(header, name).upper()


def _technique(header: Dataset) -> str:
    return _text(header, "VolumeBasedCalculationTechnique")


def _derivation_codes(header: Dataset) -> set[str]:
    """Return the codes of DCM that say how the image was derived."""
    items = value_of(header, "DerivationCodeSequence")
    if not isinstance(items, pydicom.Sequence):
        return set()
    dcm_items = [item for item in items if _text(item, "CodingSchemeDesignator") in ("DCM", "")]
    return {_text(item, "CodeValue") for item in dcm_items}

"""What kind of CT image an object says it is: a localizer, a projection, or slices computed from others.

By ImageType, whose values from the third on are the vendors' own (PS3.3 C.8.2.1.1.1), by what an
Enhanced CT says of its frames (PS3.3 C.8.16.2) and by the codes of a derivation (CID 7203). Derived
and secondary alone say nothing: anonymizers and compressors write that.

Not covered: free text, as in SeriesDescription.
"""

import re
from typing import Any

import pydicom
from pydicom.dataset import Dataset

LOCALIZER = re.compile(
    r"\b(LOCALI[SZ]ERS?|SCOUT|SCANOGRAM|TOPOGRAM|SURVIEW|SCANOSCOPE|CT SOM\d TOP)\b"
)
# CSA MIP, MIP_SAG, MIN_IP; renderings; curved reformats, whose pixels lie in no plane.
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
    """Whether the object is an overview image, from which slices are planned."""
    return any(LOCALIZER.search(value) for value in _image_type(header))


def is_projection(header: Dataset) -> bool:
    """Whether a pixel is the extreme of many, or of a rendering: the values of such an image are no volume's."""
    values = _image_type(header)
    if (
        any(PROJECTION.search(value) for value in values)
        or _technique(header) in PROJECTION_TECHNIQUES
    ):
        return True
    if (
        _text(header, "VolumetricProperties") == "DISTORTED"
        or _derivation_codes(header) & PROJECTION_CODES
    ):
        return True
    return any(ANY_PROJECTION.search(value) for value in values) and not _is_average(values)


def is_reformatted(header: Dataset) -> bool:
    """Whether slices were computed from other slices: in another plane, at other places, or as an average."""
    values = _image_type(header)
    if _is_average(values) or any(REFORMATTED.search(value) for value in values):
        return True
    if (
        _text(header, "VolumetricProperties") == "SAMPLED"
        or _technique(header) in REFORMATTED_TECHNIQUES
    ):
        return True
    return bool(_derivation_codes(header) & REFORMATTED_CODES)


def _is_average(values: list[str]) -> bool:
    return any(AVERAGE.search(value) for value in values)


def _image_type(header: Dataset) -> list[str]:
    """The values of ImageType in capitals, with a blank for whatever else is no letter or digit."""
    value: Any = header.get("ImageType") or []
    values = [value] if isinstance(value, str) else list(value)
    return [" ".join(re.findall(r"[A-Z0-9]+", str(each).upper())) for each in values]


def _text(header: Dataset, name: str) -> str:
    return str(header.get(name) or "").strip().upper()


def _technique(header: Dataset) -> str:
    return _text(header, "VolumeBasedCalculationTechnique")


def _derivation_codes(header: Dataset) -> set[str]:
    """The codes of DCM that say how the image was derived."""
    items = header.get("DerivationCodeSequence")
    if not isinstance(items, pydicom.Sequence):
        return set()
    return {
        _text(item, "CodeValue")
        for item in items
        if _text(item, "CodingSchemeDesignator") in ("DCM", "")
    }

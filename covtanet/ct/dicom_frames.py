"""DICOM objects to frames: one header and one stream of pixels per slice.

Single-frame objects and Enhanced CT, which keeps many slices in one object.
"""

import collections
from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)

from covtanet.ct.dicom_values import tag_of, value_of
from covtanet.errors import Reason, StudyError

PLAIN_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian}
ENHANCED_CLASSES = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
# Attributes of a single-frame object, apart from those of its pixels and their position.
ACQUISITION = (
    "AcquisitionNumber", "AcquisitionUID", "IrradiationEventUID", "AcquisitionDateTime",
    "AcquisitionDate", "AcquisitionTime", "ContentDate", "ContentTime", "ConvolutionKernel",
    "FilterType", "KVP", "TemporalPositionIdentifier",
)  # fmt: skip
KIND = (
    "ImageType",
    "VolumetricProperties",
    "VolumeBasedCalculationTechnique",
    "DerivationCodeSequence",
)
CONTRAST = ("ContrastBolusAgent", "ContrastBolusAgentSequence")
# Attributes of the object that hold for each frame unless a functional group overrides them.
COMMON = (
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    *ACQUISITION, *KIND, *CONTRAST,
)  # fmt: skip
# Functional groups of an Enhanced CT (PS3.3 C.7.6.16.2, C.8.15.3): for each, the attributes of a
# single-frame object that it holds, and the names that they have there.
GROUPS: dict[str, dict[str, str]] = {
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing"},
    "PixelValueTransformationSequence": {
        name: name for name in ("RescaleSlope", "RescaleIntercept", "RescaleType")
    },
    # A converted object keeps here the attributes of its sources for which the functional groups
    # have no place.
    "UnassignedSharedConvertedAttributesSequence": {
        name: name for name in (*ACQUISITION, *CONTRAST)
    },
    "UnassignedPerFrameConvertedAttributesSequence": {
        name: name for name in (*ACQUISITION, *CONTRAST)
    },
    "FrameContentSequence": {
        "AcquisitionNumber": "FrameAcquisitionNumber",
        "AcquisitionDateTime": "FrameAcquisitionDateTime",
        "TemporalPositionIdentifier": "TemporalPositionIndex",
    },
    "IrradiationEventIdentificationSequence": {"IrradiationEventUID": "IrradiationEventUID"},
    "CTReconstructionSequence": {"ConvolutionKernel": "ConvolutionKernel"},
    "CTXRayDetailsSequence": {"FilterType": "FilterType", "KVP": "KVP"},
    "CTImageFrameTypeSequence": {
        "ImageType": "FrameType",
        "VolumetricProperties": "VolumetricProperties",
        "VolumeBasedCalculationTechnique": "VolumeBasedCalculationTechnique",
    },
    "DerivationImageSequence": {"DerivationCodeSequence": "DerivationCodeSequence"},
}
# A group with an item for each contrast agent.
USAGE = "ContrastBolusUsageSequence"
# Attributes that a series can be read without: a value that cannot be converted counts as missing.
OPTIONAL = ("PixelPaddingValue", "PixelPaddingRangeLimit", *ACQUISITION, *KIND, *CONTRAST)


@dataclass(frozen=True)
class Frame:
    """One slice of an object.

    dataset: the attributes of a single-frame CT image. source: the object that holds the pixels.
    index: of the frame among the ``count`` frames of the object.
    """

    dataset: Dataset
    source: FileDataset
    index: int = 0
    count: int = 1

    @property
    def syntax(self) -> str:
        """The transfer syntax."""
        return str(self.source.file_meta.TransferSyntaxUID)

    @property
    def num_bytes(self) -> int:
        """Size of the uncompressed slice according to the header."""
        num_pixels = int(self.dataset.Rows) * int(self.dataset.Columns)
        return num_pixels * int(self.dataset.BitsAllocated) // 8

    def stream(self) -> bytes | memoryview:
        """Return the bytes of this slice; uncompressed ones are not copied."""
        if self.syntax in PLAIN_SYNTAXES:
            start = self.index * self.num_bytes
            return memoryview(self.source.PixelData)[start : start + self.num_bytes]
        return get_frame(self.source.PixelData, self.index, number_of_frames=self.count)


def read_frames(datasets: AnySequence[FileDataset]) -> list[Frame]:
    """Return all frames of a series' objects.

    Raises:
        StudyError: ``unreadable`` if a multi-frame object does not describe each of its frames.
    """
    return [frame for dataset in datasets for frame in _frames(dataset)]


def is_convertible(dataset: Dataset, name: str) -> bool:
    """Return whether an attribute is missing, or can be converted with everything nested in it."""
    try:
        if tag_of(name) not in dataset:
            return True
        element = dataset[tag_of(name)]
        is_sequence = isinstance(element.value, Sequence)
        if is_sequence:
            for item in element.value:
                collections.deque(item.iterall(), maxlen=0)
        return is_sequence == (dictionary_VR(name) == "SQ")
    # pydicom converts a value at the first access, and raises many kinds of errors then.
    except Exception:
        return False


def _frames(dataset: FileDataset) -> Iterator[Frame]:
    if value_of(dataset, "SOPClassUID") not in ENHANCED_CLASSES:
        yield Frame(dataset, dataset)
        return
    count = int(value_of(dataset, "NumberOfFrames") or 1)
    shared = value_of(dataset, "SharedFunctionalGroupsSequence") or []
    per_frame = value_of(dataset, "PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != count:
        raise StudyError(
            Reason.UNREADABLE, f"an object of {count} frames describes {len(per_frame)} of them"
        )
    shared_groups = shared[0] if len(shared) else Dataset()
    for index, frame_groups in enumerate(per_frame):
        yield Frame(_single_frame(dataset, shared_groups, frame_groups), dataset, index, count)


def _single_frame(dataset: FileDataset, shared_groups: Dataset, frame_groups: Dataset) -> Dataset:
    """Return a frame's attributes under the names of a single-frame CT image.

    A group of the frame goes before the shared group, and both before the object's attributes.
    """
    frame = Dataset()
    frame.SOPClassUID = CTImageStorage
    for name in COMMON:
        if name in dataset:
            frame[name] = dataset[name]
    for group, names in GROUPS.items():
        items = value_of(frame_groups, group) or value_of(shared_groups, group) or []
        if len(items):
            _copy_attributes(items[0], names, frame)
    groups = frame_groups if USAGE in frame_groups else shared_groups
    if USAGE in groups and is_convertible(groups, USAGE):
        frame[USAGE] = groups[USAGE]
    return frame


def _copy_attributes(item: Dataset, names: dict[str, str], frame: Dataset) -> None:
    """Copy attributes of a functional group, in place. names: to the frame's name, the group's."""
    for name, name_in_group in names.items():
        if name_in_group not in item:
            continue
        if name in OPTIONAL and not is_convertible(item, name_in_group):
            continue
        element = item[name_in_group]
        if name != name_in_group:
            element = DataElement(name, element.VR, element.value)
        frame[name] = element

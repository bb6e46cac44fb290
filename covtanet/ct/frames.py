"""DICOM objects to frames: one header and one stream of pixels for each slice, from single and multi-frame objects."""

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

from covtanet.errors import Reason, StudyError

PLAIN_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian}
ENHANCED_CLASSES = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
# Attributes of a single-frame object beside those that say how its pixels are stored and where they
# lie.
ACQUISITION = (
    "AcquisitionNumber", "AcquisitionUID", "IrradiationEventUID", "AcquisitionDateTime", "AcquisitionDate",
    "AcquisitionTime", "ContentDate", "ContentTime", "ConvolutionKernel", "FilterType", "KVP",
    "TemporalPositionIdentifier",
)  # fmt: skip
KIND = (
    "ImageType",
    "VolumetricProperties",
    "VolumeBasedCalculationTechnique",
    "DerivationCodeSequence",
)
CONTRAST = ("ContrastBolusAgent", "ContrastBolusAgentSequence")
# What an object says of all its frames unless a functional group says it of one.
COMMON = (
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", *ACQUISITION, *KIND, *CONTRAST,
)  # fmt: skip
# Where an Enhanced CT keeps what a single-frame object says of its one slice (PS3.3 C.7.6.16.2,
# C.8.15.3), under the name that it has there.
GROUPS: dict[str, dict[str, str]] = {
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing"},
    "PixelValueTransformationSequence": {
        name: name for name in ("RescaleSlope", "RescaleIntercept", "RescaleType")
    },
    # A converted object keeps here what its sources say and the functional groups have no place
    # for.
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
# What a series can be read without: a value that makes no sense is none.
OPTIONAL = ("PixelPaddingValue", "PixelPaddingRangeLimit", *ACQUISITION, *KIND, *CONTRAST)


@dataclass(frozen=True)
class Frame:
    """One slice: a dataset with the attributes of a single-frame CT image, and its place in the object's pixels."""

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
        """What the header says that the slice takes uncompressed."""
        return (
            int(self.dataset.Rows)
            * int(self.dataset.Columns)
            * int(self.dataset.BitsAllocated)
            // 8
        )

    def stream(self) -> bytes | memoryview:
        """The slice's own bytes; uncompressed ones are not copied."""
        if self.syntax in PLAIN_SYNTAXES:
            start = self.index * self.num_bytes
            return memoryview(self.source.PixelData)[start : start + self.num_bytes]
        return get_frame(self.source.PixelData, self.index, number_of_frames=self.count)


def frames_of(datasets: AnySequence[FileDataset]) -> list[Frame]:
    """All frames of a series' objects.

    Raises:
        StudyError: ``unreadable`` where a multi-frame object does not describe each of its frames.
    """
    return [frame for dataset in datasets for frame in _frames(dataset)]


def is_sound(dataset: Dataset, name: str) -> bool:
    """Whether an attribute is missing, or of its kind and can be converted, as far down as it goes."""
    try:
        if name not in dataset:
            return True
        element = dataset[name]
        is_sequence = isinstance(element.value, Sequence)
        if is_sequence:
            for item in element.value:
                collections.deque(item.iterall(), maxlen=0)
        return is_sequence == (dictionary_VR(name) == "SQ")
    except (
        Exception
    ):  # pydicom converts a value when it is first asked for, with errors of many kinds
        return False


def _frames(dataset: FileDataset) -> Iterator[Frame]:
    if dataset.get("SOPClassUID") not in ENHANCED_CLASSES:
        yield Frame(dataset, dataset)
        return
    count = int(dataset.get("NumberOfFrames") or 1)
    shared, per_frame = (
        dataset.get(name) or []
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    )
    if len(per_frame) != count:
        raise StudyError(
            Reason.UNREADABLE, f"an object of {count} frames describes {len(per_frame)} of them"
        )
    groups = shared[0] if len(shared) else Dataset()
    for index, own in enumerate(per_frame):
        frame = Dataset()
        frame.SOPClassUID = CTImageStorage  # what it is once it stands alone
        for name in COMMON:
            if name in dataset:
                frame[name] = dataset[name]
        for sequence, names in GROUPS.items():
            items = own.get(sequence) or groups.get(sequence) or []
            for name, name_in_group in names.items():
                if not len(items) or name_in_group not in items[0]:
                    continue
                if name in OPTIONAL and not is_sound(items[0], name_in_group):
                    continue
                element = items[0][name_in_group]
                frame[name] = (
                    element
                    if name == name_in_group
                    else DataElement(name, element.VR, element.value)
                )
        group = own if USAGE in own else groups
        if USAGE in group and is_sound(group, USAGE):
            frame[USAGE] = group[USAGE]
        yield Frame(frame, dataset, index, count)

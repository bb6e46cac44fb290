"""DICOM objects to frames: one header and one stream of pixels for each slice, from single and multi-frame objects."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import get_frame
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)

from covtanet.errors import StudyError

PLAIN_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian}
ENHANCED_CLASSES = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
# Where an Enhanced CT keeps what a single-frame object says of its one slice (PS3.3 C.7.6.16.2).
GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}
COMMON = (
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelPaddingValue",
)  # fmt: skip


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
        return int(self.dataset.Rows) * int(self.dataset.Columns) * int(self.dataset.BitsAllocated) // 8

    def stream(self) -> bytes | memoryview:
        """The slice's own bytes; uncompressed ones are not copied."""
        if self.syntax in PLAIN_SYNTAXES:
            start = self.index * self.num_bytes
            return memoryview(self.source.PixelData)[start : start + self.num_bytes]
        return get_frame(self.source.PixelData, self.index, number_of_frames=self.count)


def frames_of(datasets: Sequence[FileDataset]) -> list[Frame]:
    """All frames of a series' objects.

    Raises:
        StudyError: ``unreadable`` where a multi-frame object does not describe each of its frames.
    """
    return [frame for dataset in datasets for frame in _frames(dataset)]


def _frames(dataset: FileDataset) -> Iterator[Frame]:
    if dataset.get("SOPClassUID") not in ENHANCED_CLASSES:
        yield Frame(dataset, dataset)
        return
    count = int(dataset.get("NumberOfFrames") or 1)
    shared, per_frame = (
        dataset.get(name) or [] for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    )
    if len(per_frame) != count:
        raise StudyError("unreadable", f"an object of {count} frames describes {len(per_frame)} of them")
    for index, own in enumerate(per_frame):
        frame = Dataset()
        frame.SOPClassUID = CTImageStorage  # what it is once it stands alone
        for name in COMMON:
            if name in dataset:
                frame[name] = dataset[name]
        for sequence, names in GROUPS.items():
            items = own.get(sequence) or (shared[0].get(sequence) if len(shared) else None) or []
            for name in names:
                if len(items) and name in items[0]:
                    frame[name] = items[0][name]
        yield Frame(frame, dataset, index, count)

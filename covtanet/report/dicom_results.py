"""Results of a screened DICOM series as DICOM: a SEG of lesion and lung, and an SR (TID 1500).

Both refer to the source series. Their UIDs follow from run and series, so the same result is the
same object. No pixel of the source is read, and the objects hold nothing about the patient that the
header of the source does not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import highdicom as hd
import numpy as np
import pydicom
from highdicom.sr import (
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from covtanet.report.dicom_source import completed, quiet

MAKER, DEVICE = "CovTANet on Ray", "covtanet"
SCHEME = "99COVTANET"
LESION, LUNG = 1, 2  # numbers of the segments
NO_UNITS = Code("1", "UCUM", "no units")
MILLILITER = Code("ml", "UCUM", "milliliter")
INVOLVEMENT = Code("INVOLVEMENT", SCHEME, "Share of the lung that is lesion")
P_INFECTED = Code("P-INFECTED", SCHEME, "Probability of infection by the network")


@dataclass(frozen=True)
class Segment:
    """A segment of the SEG, which the SR refers to."""

    number: int
    label: str
    category: Code
    kind: Code


LESION_SEGMENT = Segment(
    LESION, "lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion
)
LUNG_SEGMENT = Segment(LUNG, "lung", codes.SCT.AnatomicalStructure, codes.SCT.Lung)
SEGMENTS = (LESION_SEGMENT, LUNG_SEGMENT)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The values of a ledger row that the objects hold.

    A value that is null in the ledger is not a measurement of the report.
    """

    run_id: str
    series_key: str
    software_version: str
    model: str
    lesion_volume_ml: float | None
    lung_volume_ml: float | None
    involvement: float | None
    p_infected: float | None

    def uid(self, name: str) -> str:
        """Return the UID of a part of this result."""
        return str(generate_uid(entropy_srcs=[self.run_id, self.series_key, name]))


@quiet()
def segmentation(
    headers: Sequence[pydicom.Dataset],
    lesion: NDArray[np.bool_],
    lung: NDArray[np.bool_],
    finding: Finding,
) -> hd.seg.Segmentation:
    """Return a DICOM SEG with the segments lesion (1) and lung (2).

    headers: of the slices, complete or not, see ``dicom_source``. lesion, lung: frames of
    ``frames_of``, (slices, rows, columns).
    """
    return hd.seg.Segmentation(
        source_images=completed(headers),
        # A view: bool and uint8 hold the same bytes.
        pixel_array=np.stack([lesion, lung], axis=-1).view(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(segment, finding) for segment in SEGMENTS],
        series_instance_uid=finding.uid("segmentation series"),
        series_number=9001,
        sop_instance_uid=finding.uid("segmentation"),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=DEVICE,
        software_versions=finding.software_version,
        device_serial_number="0",
        series_description="Research use only: lesion and lung",
    )


def _description(segment: Segment, finding: Finding) -> hd.seg.SegmentDescription:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=DEVICE, version=finding.model, family=codes.DCM.ArtificialIntelligence
    )
    return hd.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.label,
        segmented_property_category=segment.category,
        segmented_property_type=segment.kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=finding.uid(f"tracking {segment.label}"),
        tracking_id=segment.label,
    )


@quiet()
def structured_report(
    headers: Sequence[pydicom.Dataset], seg: hd.seg.Segmentation, finding: Finding
) -> Comprehensive3DSR:
    """Return a DICOM SR (TID 1500) with volumes, involvement and probability.

    It refers to the segments of ``seg``; a segment that ``seg`` lacks has no measurements.
    """
    measurements = {
        LESION_SEGMENT: [
            *_measured(codes.SCT.Volume, finding.lesion_volume_ml, MILLILITER, 4),
            *_measured(INVOLVEMENT, finding.involvement, NO_UNITS, 6),
            *_measured(P_INFECTED, finding.p_infected, NO_UNITS, 6),
        ],
        LUNG_SEGMENT: _measured(codes.SCT.Volume, finding.lung_volume_ml, MILLILITER, 4),
    }
    numbers = {int(item.SegmentNumber) for item in seg.SegmentSequence}
    groups = [
        _group(segment, values, seg, finding)
        for segment, values in measurements.items()
        if segment.number in numbers
    ]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer(finding)),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    return Comprehensive3DSR(
        evidence=[seg, *completed(headers)],
        content=content,
        series_number=9002,
        series_instance_uid=finding.uid("report series"),
        sop_instance_uid=finding.uid("report"),
        instance_number=1,
        manufacturer=MAKER,
        series_description="Research use only: measurements",
        is_complete=True,
        is_verified=False,
    )


def _observer(finding: Finding) -> ObserverContext:
    """Return the software as the device that measured."""
    attributes = DeviceObserverIdentifyingAttributes(
        uid=finding.uid("device"),
        name=DEVICE,
        manufacturer_name=MAKER,
        model_name=finding.model,
    )
    return ObserverContext(
        observer_type=codes.DCM.Device, observer_identifying_attributes=attributes
    )


def _group(
    segment: Segment,
    measurements: Sequence[Measurement],
    seg: hd.seg.Segmentation,
    finding: Finding,
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Return the measurements of one segment."""
    source = SourceSeriesForSegmentation(seg.ReferencedSeriesSequence[0].SeriesInstanceUID)
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=finding.uid(f"tracking {segment.label}"), identifier=segment.label
        ),
        referenced_segment=ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=segment.number,
            source_series=source,
        ),
        finding_type=segment.kind,
        measurements=measurements or None,
    )


def _measured(name: Code, value: float | None, unit: Code, digits: int) -> list[Measurement]:
    """Return a measurement; an empty list for a null."""
    if value is None:
        return []
    return [Measurement(name=name, value=round(value, digits), unit=unit)]


@quiet()
def to_bytes(dataset: pydicom.Dataset) -> bytes:
    """Return the object as a DICOM file."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()

"""A screened DICOM series' results as DICOM: a segmentation of lesion and lung, and a structured report (TID 1500).

Both refer to the source series. Their UIDs follow from the run and the series, so that the same result is the same
object. No pixel of the source is read, and nothing of a patient is written that the source's own header does not say.
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

from covtanet.ct.series_geometry import off_grid_limit_mm
from covtanet.errors import Reason, StudyError
from covtanet.report.dicom_source import completed, quiet

MAKER, DEVICE = "CovTANet on Ray", "covtanet"
SCHEME = "99COVTANET"
LESION, LUNG = 1, 2
# One pixel further in the source is one voxel further in the mask, but for what decimal strings lose.
MAX_OFF_STEP = 0.05
# A mask keeps its affine as float32.
STORED_AFFINE_MM = 1e-3
NO_UNITS = Code("1", "UCUM", "no units")
MILLILITER = Code("ml", "UCUM", "milliliter")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a ledger row says of a series, as far as the report has it. run_id, series_key: the result's identity.

    A number that is null in the ledger is no measurement of the report.
    """

    run_id: str
    series_key: str
    software_version: str
    model: str
    lesion_volume_ml: float | None
    lung_volume_ml: float | None
    involvement: float | None
    p_infected: float | None

    def uid(self, what: str) -> str:
        """A UID of this result."""
        return str(generate_uid(entropy_srcs=[self.run_id, self.series_key, what]))


def frames_of(
    headers: Sequence[pydicom.Dataset], mask: NDArray[np.bool_], affine: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """A mask as the frames of its source's slices, (slices, rows, columns), in the order of the headers.

    mask: in any axis order; affine: its index -> LPS mm.

    Raises:
        StudyError: ``missing_position`` where a slice does not lie on the mask's grid.
    """
    to_index = np.linalg.inv(affine)
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    limits = np.array([off_grid_limit_mm(float(mm)) for mm in voxel_mm]) + STORED_AFFINE_MM
    frames = []
    for header in headers:
        corner = np.array([*header.ImagePositionPatient, 1.0], float)
        across, down = (
            np.array([*header.ImageOrientationPatient[k : k + 3], 0.0], float) for k in (0, 3)
        )
        down_mm, across_mm = (float(value) for value in header.PixelSpacing)
        exact = [to_index @ corner, to_index @ (down * down_mm), to_index @ (across * across_mm)]
        start, by_row, by_column = (np.rint(each[:3]).astype(int) for each in exact)
        off_corner, *off_steps = (np.abs(each[:3] - np.rint(each[:3])) for each in exact)
        is_on_grid = (off_corner * voxel_mm <= limits).all() and np.max(off_steps) < MAX_OFF_STEP
        rows, columns = np.arange(header.Rows)[:, None], np.arange(header.Columns)[None, :]
        index = [start[k] + by_row[k] * rows + by_column[k] * columns for k in range(3)]
        if not is_on_grid or any(
            each.min() < 0 or each.max() >= mask.shape[k] for k, each in enumerate(index)
        ):
            raise StudyError(
                Reason.MISSING_POSITION, "a slice does not lie on the grid of its mask"
            )
        frames.append(mask[index[0], index[1], index[2]])
    return np.stack(frames)


@quiet()
def segmentation(
    headers: Sequence[pydicom.Dataset],
    lesion: NDArray[np.bool_],
    lung: NDArray[np.bool_],
    finding: Finding,
) -> hd.seg.Segmentation:
    """A DICOM SEG with the segments lesion (1) and lung (2), whose frames are those of ``frames_of``.

    headers: of the slices, whatever their source left out, see ``dicom_source``.
    """
    algorithm = hd.AlgorithmIdentificationSequence(
        name=DEVICE, version=finding.model, family=codes.DCM.ArtificialIntelligence
    )

    def describe(number: int, label: str, category: Code, kind: Code) -> hd.seg.SegmentDescription:
        return hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=finding.uid(f"tracking {label}"),
            tracking_id=label,
        )

    found = hd.seg.Segmentation(
        source_images=completed(headers),
        pixel_array=np.stack([lesion, lung], axis=-1).astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            describe(
                LESION, "lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion
            ),
            describe(LUNG, "lung", codes.SCT.AnatomicalStructure, codes.SCT.Lung),
        ],
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
    return found


@quiet()
def structured_report(
    headers: Sequence[pydicom.Dataset], seg: hd.seg.Segmentation, finding: Finding
) -> Comprehensive3DSR:
    """A DICOM SR (TID 1500) with volumes, involvement and probability, which refers to the segments."""
    observer = ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=finding.uid("device"),
            name=DEVICE,
            manufacturer_name=MAKER,
            model_name=finding.model,
        ),
    )
    involvement = Code("INVOLVEMENT", SCHEME, "Share of the lung that is lesion")
    p_infected = Code("P-INFECTED", SCHEME, "Probability of infection by the network")
    of_lesion = [
        *_measured(codes.SCT.Volume, finding.lesion_volume_ml, MILLILITER, 4),
        *_measured(involvement, finding.involvement, NO_UNITS, 6),
        *_measured(p_infected, finding.p_infected, NO_UNITS, 6),
    ]
    of_lung = _measured(codes.SCT.Volume, finding.lung_volume_ml, MILLILITER, 4)
    source = SourceSeriesForSegmentation(seg.ReferencedSeriesSequence[0].SeriesInstanceUID)
    present = {int(each.SegmentNumber) for each in seg.SegmentSequence}
    groups = [
        VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(
                uid=finding.uid(f"tracking {label}"), identifier=label
            ),
            referenced_segment=ReferencedSegment(
                sop_class_uid=seg.SOPClassUID,
                sop_instance_uid=seg.SOPInstanceUID,
                segment_number=number,
                source_series=source,
            ),
            finding_type=kind,
            measurements=measurements or None,
        )
        for number, label, kind, measurements in (
            (LESION, "lesion", codes.SCT.Lesion, of_lesion),
            (LUNG, "lung", codes.SCT.Lung, of_lung),
        )
        if number in present
    ]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
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


def _measured(name: Code, value: float | None, unit: Code, digits: int) -> list[Measurement]:
    """Return a measurement, none for a null."""
    return [] if value is None else [Measurement(name=name, value=round(value, digits), unit=unit)]


@quiet()
def to_bytes(dataset: pydicom.Dataset) -> bytes:
    """The object as a DICOM file."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()

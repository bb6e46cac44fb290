"""Acquisitions of one series UID: end to end they are one stack, interleaved they are refused."""

from collections.abc import Callable

import numpy as np
import pytest
from odd_dicom import (
    at_depths,
    changed,
    clock,
    copied,
    interleaved,
    item,
    reason_of,
    sets,
    with_groups,
)
from pydicom.dataset import FileDataset


def phases_at_the_same_places() -> list[FileDataset]:
    return interleaved(sets(AcquisitionNumber=1), sets(AcquisitionNumber=2), offset_mm=0.0)


def half_at_the_same_places() -> list[FileDataset]:
    """Slices of 9 mm of one acquisition, of 18 mm of the other."""
    fine = changed(sets(AcquisitionNumber=1), at_depths(np.arange(24) * 9.0))
    return fine + changed(
        sets(AcquisitionNumber=2), [copied(one, f"8.{k}") for k, one in enumerate(fine[::2])]
    )


def one_of_three(change: Callable[[int], dict[str, object]]) -> list[FileDataset]:
    """A regular stack in which every third slice is another acquisition's."""
    return changed(
        lambda index, one: sets(**change(int(index % 3 == 2)))(index, one),
        at_depths(np.arange(36) * 5.0),
    )


MIXED: dict[str, Callable[[], list[FileDataset]]] = {
    "acquisition number": lambda: interleaved(sets(AcquisitionNumber=1), sets(AcquisitionNumber=2)),
    "acquisition number per slice": lambda: interleaved(
        sets(AcquisitionNumber=lambda k: k + 1), sets(AcquisitionNumber=lambda k: k + 13)
    ),
    "acquisition number per slab": lambda: interleaved(
        sets(AcquisitionNumber=lambda k: k // 4), sets(AcquisitionNumber=lambda k: 3 + k // 4)
    ),
    "kernel": lambda: interleaved(sets(ConvolutionKernel="B30f"), sets(ConvolutionKernel="B70f")),
    "kernel of two values": lambda: interleaved(
        sets(ConvolutionKernel=["Br40d", "3"]), sets(ConvolutionKernel=["Br40d", "4"])
    ),
    "filter": lambda: interleaved(sets(FilterType="BODY"), sets(FilterType="LUNG")),
    "acquisition UID": lambda: interleaved(
        sets(AcquisitionUID="1.2.8"), sets(AcquisitionUID="1.2.9")
    ),
    "event": lambda: interleaved(
        sets(IrradiationEventUID="1.2.8"), sets(IrradiationEventUID="1.2.9")
    ),
    "voltage": lambda: interleaved(sets(KVP="80"), sets(KVP="140")),
    "phase": lambda: interleaved(
        sets(TemporalPositionIdentifier=1), sets(TemporalPositionIdentifier=2)
    ),
    "kernel, offset by a tenth": lambda: interleaved(
        sets(ConvolutionKernel="B30f"), sets(ConvolutionKernel="B70f"), offset_mm=1.8
    ),
    "time of each": lambda: interleaved(
        sets(AcquisitionTime=clock(36000)), sets(AcquisitionTime=clock(36030))
    ),
    "time per slice": lambda: interleaved(
        sets(AcquisitionTime=clock(36000, 0.5)), sets(AcquisitionTime=clock(36012, 0.5))
    ),
    "time per slice, the other way back": lambda: interleaved(
        sets(AcquisitionTime=clock(36000, 0.5)), sets(AcquisitionTime=clock(36018, -0.5))
    ),
    "time per slice, both downwards": lambda: interleaved(
        sets(AcquisitionTime=clock(36006, -0.5)), sets(AcquisitionTime=clock(36018, -0.5))
    ),
    "time per pair of slices": lambda: interleaved(
        sets(AcquisitionTime=lambda k: clock(36006, -1)(k // 2)),
        sets(AcquisitionTime=lambda k: clock(36018, -1)(k // 2)),
    ),
    "times around midnight": lambda: interleaved(
        sets(AcquisitionTime=clock(86390, 0.5), AcquisitionDate="20200101"),
        sets(AcquisitionTime=clock(20, 0.5), AcquisitionDate="20200102"),
    ),
    "date and time": lambda: interleaved(
        sets(AcquisitionDateTime="20200101101500.0"),
        sets(AcquisitionDateTime="20200101101530.0+0100"),
    ),
    "the same time of two days": lambda: interleaved(
        sets(AcquisitionTime=clock(36000), AcquisitionDate="20200101"),
        sets(AcquisitionTime=clock(36000), AcquisitionDate="20200105"),
    ),
    "content time of each": lambda: interleaved(
        sets(ContentTime=clock(36000)), sets(ContentTime=clock(36030))
    ),
    "content time per slice": lambda: interleaved(
        sets(ContentTime=clock(36000, 1)), sets(ContentTime=clock(36012, 1))
    ),
    "every third slice by number": lambda: one_of_three(
        lambda group: {"AcquisitionNumber": 1 + group}
    ),
    "every third slice by kernel": lambda: one_of_three(
        lambda group: {"ConvolutionKernel": "AB"[group]}
    ),
    "every third slice by time": lambda: one_of_three(
        lambda group: {"AcquisitionTime": clock(36000 + 40 * group)}
    ),
    "one with missing slices": lambda: interleaved(
        sets(AcquisitionNumber=1), sets(AcquisitionNumber=2)
    )[:20],
    "one with another pixel spacing": lambda: interleaved(
        sets(AcquisitionNumber=1), sets(AcquisitionNumber=2, PixelSpacing=["5", "5"])
    ),
    "one without a rescale": lambda: interleaved(
        sets(AcquisitionNumber=1), sets(AcquisitionNumber=2, RescaleSlope=None)
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_interleaved_acquisitions_are_refused(name: str) -> None:
    assert reason_of(MIXED[name]()) == "mixed_acquisitions"


def stack(change: Callable[[int, FileDataset], None]) -> list[FileDataset]:
    """A regular stack of 48 slices, changed."""
    return changed(change, at_depths(np.arange(48) * 5.0))


SHUFFLED = np.random.default_rng(1).permutation(48)
ONE_STACK: dict[str, Callable[[], list[FileDataset]]] = {
    "one of all": lambda: stack(
        sets(AcquisitionNumber=1, AcquisitionTime=clock(36000), ConvolutionKernel="B30f")
    ),
    "a number per slice": lambda: stack(sets(AcquisitionNumber=lambda k: k)),
    "a number per slice, downwards": lambda: stack(sets(AcquisitionNumber=lambda k: 48 - k)),
    "a time per slice": lambda: stack(sets(AcquisitionTime=clock(36000, 0.4))),
    "a time per slice, downwards": lambda: stack(sets(AcquisitionTime=clock(36000, -0.4))),
    "a time for four slices each": lambda: stack(
        sets(AcquisitionTime=lambda k: clock(36000, -1)(k // 4))
    ),
    "times over midnight": lambda: stack(sets(AcquisitionTime=clock(86390, 0.5))),
    "times over midnight, downwards": lambda: stack(sets(AcquisitionTime=clock(10, -0.5))),
    "times over midnight with the day": lambda: stack(
        sets(
            AcquisitionTime=clock(86390, 0.5),
            AcquisitionDate=lambda k: "20200101" if k < 20 else "20200102",
        )
    ),
    "some without a day": lambda: stack(
        lambda k, one: sets(
            AcquisitionTime=clock(36000, 0.5), AcquisitionDate="20200101" if k % 2 else ""
        )(k, one)
    ),
    "some without a time": lambda: stack(
        lambda k, one: sets(AcquisitionTime=clock(36000, 0.5)(k) if k % 3 else "")(k, one)
    ),
    "some without a number": lambda: stack(
        lambda k, one: sets(AcquisitionNumber=1)(k, one) if k % 2 else None
    ),
    "slabs end to end": lambda: stack(
        sets(
            AcquisitionNumber=lambda k: 1 + k // 8,
            AcquisitionTime=lambda k: clock(36000, 3)(k // 8),
            IrradiationEventUID=lambda k: f"1.2.{k // 8}",
        )
    ),
    "slabs, each downwards": lambda: stack(
        sets(AcquisitionTime=lambda k: clock(36000, 0.2)(20 * (k // 8) - k % 8))
    ),
    "a slab taken again": lambda: stack(
        sets(
            AcquisitionNumber=lambda k: 9 if k // 8 == 2 else 1 + k // 8,
            AcquisitionTime=lambda k: clock(36000, 3)(40 if k // 8 == 2 else k // 8),
        )
    ),
    "two halves of two kernels": lambda: stack(
        sets(ConvolutionKernel=lambda k: "AB"[k // 24], KVP=lambda k: ("80", "140")[k // 24])
    ),
    "slabs that overlap by a slice": lambda: stack(
        sets(AcquisitionNumber=lambda k: 1 + (k + (k % 8 == 7) - (k % 8 == 0)) // 8)
    ),
    "slabs of two events that overlap by four slices": lambda: stack(
        sets(IrradiationEventUID=lambda k: f"1.2.{int(k > 27 or (k > 19 and k % 2 == 1))}")
    ),
    "an event per slice": lambda: stack(sets(IrradiationEventUID=lambda k: f"1.2.3.{k}")),
    "written in parallel": lambda: stack(
        sets(ContentTime=lambda k: clock(36000, 0.05)(int(SHUFFLED[k])))
    ),
    "written in any order within two seconds": lambda: stack(
        sets(ContentTime=lambda k: clock(36000, 1)(int(SHUFFLED[k]) % 2))
    ),
    "written by two workers": lambda: stack(
        sets(ContentTime=lambda k: clock(36000, 0.1)(k // 2 * 2 + 7 * (k % 2)))
    ),
    "written odd ones first": lambda: stack(
        sets(
            ContentTime=lambda k: clock(36000, 1)(k // 2 + 24 * (k % 2)),
            AcquisitionTime=clock(36000),
        )
    ),
    "times that are none": lambda: stack(
        sets(AcquisitionTime=lambda k: "99" if k % 2 else "", ContentTime="")
    ),
}


@pytest.mark.parametrize("name", ONE_STACK)
@pytest.mark.filterwarnings("ignore:.*Invalid value")
def test_acquisitions_end_to_end_and_times_per_slice_stay_one_series(name: str) -> None:
    assert reason_of(ONE_STACK[name]()) == ""


def test_phases_at_equal_positions_are_duplicate_slices() -> None:
    assert reason_of(phases_at_the_same_places()) == "duplicate_slice"
    assert reason_of(half_at_the_same_places()) == "duplicate_slice"
    nearly = interleaved(sets(AcquisitionNumber=1), sets(AcquisitionNumber=2), offset_mm=0.01)
    assert reason_of(nearly) == "duplicate_slice"


def test_acquisitions_without_positions_have_no_order() -> None:
    series = interleaved(sets(AcquisitionNumber=1), sets(AcquisitionNumber=2))
    for dataset in series:
        del dataset.ImagePositionPatient
    assert reason_of(series) == "missing_position"


def test_acquisitions_of_two_directions_have_no_order() -> None:
    turned_by_6_degrees = ["1", "0", "0", "0", "0.994522", "0.104528"]
    other = sets(AcquisitionNumber=2, ImageOrientationPatient=turned_by_6_degrees)
    assert reason_of(interleaved(sets(AcquisitionNumber=1), other)) == "mixed_orientation"


def test_mixed_patients_goes_before_mixed_acquisitions() -> None:
    series = interleaved(sets(AcquisitionNumber=1), sets(AcquisitionNumber=2, PatientID="ANOTHER"))
    assert reason_of(series) == "mixed_patients"


def every_second_frame(group: str, name: str, values: tuple[object, object]) -> FileDataset:
    return with_groups(
        lambda index, frame: setattr(frame, group, item(**{name: values[index % 2]}))
    )


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("CTReconstructionSequence", "ConvolutionKernel", ("B30f", "B70f")),
        ("CTXRayDetailsSequence", "FilterType", ("BODY", "LUNG")),
        ("FrameContentSequence", "FrameAcquisitionNumber", (1, 2)),
        ("FrameContentSequence", "FrameAcquisitionDateTime", ("20200101101500", "20200101101530")),
        ("FrameContentSequence", "TemporalPositionIndex", (1, 2)),
        ("IrradiationEventIdentificationSequence", "IrradiationEventUID", ("1.2.1", "1.2.2")),
        ("UnassignedPerFrameConvertedAttributesSequence", "AcquisitionNumber", (1, 2)),
    ],
)
def test_interleaved_frames_of_two_acquisitions_are_refused(
    group: str, name: str, values: tuple[object, object]
) -> None:
    assert reason_of([every_second_frame(group, name, values)]) == "mixed_acquisitions"
    assert reason_of([every_second_frame(group, name, values[:1] * 2)]) == ""

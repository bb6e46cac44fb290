"""Malformed inputs with the reason for which they are refused, and odd inputs that are screened."""

from collections.abc import Callable

from hostile_dicom import DICOM, big_endian_dicom, enhanced, implicit_vr, padding
from hostile_nifti import DIM, NIFTI, big_endian_nifti, halves, nifti2, patched
from sound_input import Objects, gz, named, plain_nifti, slices

OTHER: dict[str, tuple[str, Callable[[], Objects]]] = {
    "zip": ("container", lambda: {"a.zip": b"PK\x05\x06" + bytes(18)}),
    "7z": ("container", lambda: {"a.7z": b"7z\xbc\xaf\x27\x1c"}),
    "tar.gz": ("container", lambda: {"a.tar.gz": gz(bytes(1024))}),
}


CATALOGUE = {
    **{f"nifti {name}": case for name, case in NIFTI.items()},
    **{f"dicom {name}": case for name, case in DICOM.items()},
    **{f"other {name}": case for name, case in OTHER.items()},
}


# Odd but legal: every one gives the sound series' own volume, but for padding.
CONTROLS: dict[str, Callable[[], Objects]] = {
    "nifti 2": nifti2,
    "nifti big endian": big_endian_nifti,
    "nifti of halves": halves,
    "nifti in two gzip members": lambda: {
        "a.nii.gz": gz(plain_nifti()[:9000]) + gz(plain_nifti()[9000:])
    },
    "nifti with something behind it": lambda: {"a.nii": plain_nifti() + bytes(100)},
    "nifti with a fourth dimension of one": lambda: patched((DIM, "5h", (4, 64, 64, 12, 1))),
    "dicom without names": lambda: {
        f"{k * 7919 % 97:02d}": data for k, data in enumerate(slices())
    },
    "dicom behind an executable's preamble": lambda: named([b"MZ" + data[2:] for data in slices()]),
    "dicom with implicit VR": implicit_vr,
    "dicom big endian": big_endian_dicom,
    "dicom in one object": enhanced,
    "dicom with padding": padding,
}

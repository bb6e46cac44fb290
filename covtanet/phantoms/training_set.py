"""Phantoms as labelled volumes for training, in the project's layout or in MosMedData's."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from covtanet import storage
from covtanet.ct import nifti
from covtanet.data.labels import LabelledVolume, write_labels
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import PhantomConfig, make_phantom
from covtanet.phantoms.sampling import severity_of

GRADE_OF_SEVERITY = {None: 0, "mild": 1, "severe": 2}
# MosMedData has lesion masks of this grade only.
GRADE_WITH_MASK = 1


def write_training_set(
    uri: str, phantoms: Iterable[PhantomConfig], num_processes: int = 1
) -> list[LabelledVolume]:
    """Write volumes, lesion masks and labels.parquet."""
    # Spawned, since a forked process would share open connections.
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        volumes = list(pool.map(partial(_write_labelled, uri), phantoms))
    write_labels(storage.join(uri, "labels.parquet"), volumes)
    return volumes


def _write_labelled(uri: str, config: PhantomConfig) -> LabelledVolume:
    phantom = make_phantom(config)
    grid = nifti_grid(phantom)
    name = f"phantom-{config.seed}"
    volume_path, mask_path = f"volumes/{name}.nii.gz", f"masks/{name}_mask.nii.gz"
    storage.write_bytes(storage.join(uri, volume_path), nifti.write(phantom.hu, grid))
    storage.write_bytes(storage.join(uri, mask_path), nifti.write(phantom.lesion_mask, grid))
    return LabelledVolume(
        volume_path=volume_path,
        lesion_mask_path=mask_path,
        patient=name,
        diagnosis="infected" if config.involvement else "normal",
        severity=severity_of(config.involvement),
    )


def write_mosmed(uri: str, phantoms: Iterable[PhantomConfig], num_processes: int = 1) -> int:
    """Write phantoms in the layout of MosMedData; return their number.

    As there, only volumes of grade CT-1 have lesion masks.
    """
    numbered = list(enumerate(phantoms, start=1))
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        return sum(pool.map(partial(_write_study, uri), numbered))


def _write_study(uri: str, numbered: tuple[int, PhantomConfig]) -> int:
    number, config = numbered
    phantom = make_phantom(config)
    grid = nifti_grid(phantom)
    name = f"study_{number:04d}"
    grade = GRADE_OF_SEVERITY[severity_of(config.involvement)]
    volume_uri = storage.join(uri, f"studies/CT-{grade}/{name}.nii.gz")
    storage.write_bytes(volume_uri, nifti.write(phantom.hu, grid))
    if grade == GRADE_WITH_MASK:
        mask_uri = storage.join(uri, f"masks/{name}_mask.nii.gz")
        storage.write_bytes(mask_uri, nifti.write(phantom.lesion_mask, grid))
    return 1

"""The functions of the public interface; ``import covtanet`` gives them."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from covtanet.ct import dicom, nifti
from covtanet.ct.volume import Volume
from covtanet.inference.predictor import Predictor, refuse_without_segmentation
from covtanet.ledger.view import newest_rows
from covtanet.model.saved_model import SavedModel
from covtanet.screening.config import ScreeningConfig, for_model
from covtanet.screening.study import Screener


def read_volume(path: str | Path) -> Volume:
    """Read one series: a NIfTI file, or a folder with the DICOM objects of one series.

    The file is parsed in this process: use ``screen_study`` for input that is not trusted.

    Returns the volume in HU, (z, y, x), with its affine to LPS millimetres.

    Raises:
        StudyError: the input is not a chest CT that can be read; ``reason`` is its code.
        OSError: a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return dicom.read_series(item.read_bytes() for item in files)
    return nifti.read(path.read_bytes())


def screen_study(
    uri: str | Path, model: SavedModel, config: ScreeningConfig | None = None
) -> list[dict[str, Any]]:
    """Screen a NIfTI file or a folder with DICOM, decoding in a sandboxed process.

    uri: a path or s3:// URI. config: default settings if it is left out.

    The network runs on one thread. Returns one row per series in the ledger's columns
    (``docs/ledger.md``); those that belong to a run of the screening job are null.

    Raises:
        CheckpointError: the model marks no lesions.
        NoSeriesError: the input holds no series.
        WeakSandboxError: the kernel cannot confine the decoder.
    """
    refuse_without_segmentation(model)
    config = for_model(config or ScreeningConfig(), model.preprocessing, model.readout)
    predictor = Predictor(
        model,
        engine=config.engine,
        max_batch_slices=config.max_batch_slices,
        flips=config.flips,
    )
    screener = Screener(predictor, predictor.window, config, model.digest)
    try:
        return list(screener(str(uri)))
    finally:
        screener.close()


def read_ledger(uri: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Return the newest row of every series of a ledger.

    uri: folder or s3:// prefix of the ledger. columns: all if left out.

    Raises:
        LedgerVersionError: a run was written with another schema version.
    """
    return newest_rows(str(uri), columns)

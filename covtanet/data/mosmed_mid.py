"""One middle slice of each study of MosMedData, JPEG, with an index of classes and grey lines.

``index.csv`` has the columns file, class (CT-0 .. CT-4), study, hu_at_0 and hu_per_grey: HU are
``hu_at_0 + grey * hu_per_grey``, good to about 40 HU. ``lesion-masks/CLASS/NNN.png`` are masks of
some of the slices. The class is that of the whole study, whose lesions its middle slice need not
show. Grades are those of ``mosmed``.
"""

import csv
import io
import statistics

from covtanet import storage
from covtanet.data import mosmed
from covtanet.data.labels import GREY_STEPS, LabelledVolume
from covtanet.errors import ConfigError

INDEX = "index.csv"
COLUMNS = ("file", "class", "study", "hu_at_0", "hu_per_grey")
MASKS = "lesion-masks"
CLASSES = ("CT-0", "CT-1", "CT-2", "CT-3", "CT-4")

NOTES = (
    "MosMedData: CC BY-NC-ND 3.0. Figures may be published; neither the slices nor weights that "
    "were trained on them may be passed on.",
    "mosmed-mid: one middle slice of each study. The grade is the whole study's, so a mild study "
    "may show no lesion here.",
    "mosmed-mid: grey values to HU by a line per slice, good to about 40 HU; slices without a line "
    "take the median line.",
)


def read(uri: str) -> list[LabelledVolume]:
    """Read the index and find the lesion masks below a folder or s3:// prefix.

    Raises:
        ConfigError: the index lacks a column, or has an unknown class or an unreadable number.
    """
    text = storage.read_bytes(storage.join(uri, INDEX)).decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"{INDEX} has no column {missing[0]}, expected {', '.join(COLUMNS)}")
    rows = list(reader)
    median = _median_line(rows)
    masks = _masks(uri)
    return [_volume(row, median, masks) for row in rows]


def _masks(uri: str) -> dict[str, str]:
    """Return the paths of the masks by class and name of their slice."""
    folder = storage.join(uri, MASKS)
    return {
        item.path.rpartition(".")[0]: f"{MASKS}/{item.path}"
        for _, objects in storage.walk(folder, leaves_root=True)
        for item in objects
        if item.path.endswith(".png")
    }


def _median_line(rows: list[dict[str, str]]) -> str:
    """Return the line of slices that have none.

    Choice: the median of all lines. Most slices share one scale within 4 %.
    """
    lines = [line for row in rows if (line := _line(row))]
    if not lines:
        raise ConfigError(f"{INDEX} has no line from grey values to HU")
    at_0, per_grey = zip(*lines, strict=True)
    return _intensity(statistics.median(at_0), statistics.median(per_grey))


def _intensity(hu_at_0: float, hu_per_grey: float) -> str:
    """Return a line as ``LabelledVolume.intensity`` has it, by its HU at grey 0 and 255."""
    return f"grey8:{hu_at_0:.2f}:{hu_at_0 + GREY_STEPS * hu_per_grey:.2f}"


def _line(row: dict[str, str]) -> tuple[float, float] | None:
    if not row["hu_at_0"] or not row["hu_per_grey"]:
        return None
    try:
        return float(row["hu_at_0"]), float(row["hu_per_grey"])
    except ValueError as error:
        raise ConfigError(f"{INDEX} has a line that is not two numbers") from error


def _volume(row: dict[str, str], median: str, masks: dict[str, str]) -> LabelledVolume:
    if row["class"] not in CLASSES:
        raise ConfigError(f"{INDEX} has class {row['class']}, expected CT-0 to CT-4")
    diagnosis, severity = mosmed.LABELS.get(CLASSES.index(row["class"]), mosmed.SEVERE)
    line = _line(row)
    return LabelledVolume(
        volume_path=row["file"],
        patient=row["study"],
        lesion_mask_path=masks.get(row["file"].rpartition(".")[0]),
        diagnosis=diagnosis,
        severity=severity,
        intensity=_intensity(*line) if line else median,
    )

"""Files of samples: prepared slices, volumes for the diagnosis, stored features; no Ray, no torch.

Workers read them straight from storage by threads. Reading a prepared slice of 256 pixels takes 0.2
to 0.35 ms of one core, one of 512 pixels 0.7 ms. With a plan of Ray Data for each lane and epoch
workers waited for half of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.data.prepared import diagnosis_slices
from covtanet.data.prepared_file import read_samples, samples_of
from covtanet.training.features import load_features
from covtanet.training.feed import Rows


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A file with the samples of one volume: its slices, or in phase 2 the volume as a whole."""

    series: str
    uri: str
    names: tuple[str, ...]
    """Of all samples, in the file's order."""
    has_lesion: tuple[bool, ...]
    """Of each sample."""
    bytes_per_sample: int
    """In memory."""
    is_continuous: bool = True
    """Whether successive slices are neighbours in one patient."""
    is_infected: bool = False
    """Label of phase 2."""
    is_severe: bool = False
    """Label of phase 2."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all samples in memory."""
        return len(self.names) * self.bytes_per_sample


# Reads a file's samples as columns of equal length, ``name`` among them.
ReadFile = Callable[[SampleFile], Rows]


def read_slices(file: SampleFile, size_px: int) -> Rows:
    """Return the prepared slices of a volume with their lesion masks, for phase 1."""
    source = BytesIO(storage.read_bytes(file.uri))
    # One thread per file: several files are read at a time.
    return slice_rows(pq.read_table(source, use_threads=False), size_px)


def slice_rows(table: pa.Table, size_px: int) -> Rows:
    """Return a table of prepared slices as columns."""
    samples = samples_of(table, size_px)
    if samples.lesion is None:
        raise RuntimeError("phase 1 got slices without lesion masks")
    # A sample is named by its volume and slice, which a draw and an error message use.
    pairs = zip(table["volume"].to_pylist(), table["slice"].to_pylist(), strict=True)
    return {
        "name": np.array([slice_name(volume, index) for volume, index in pairs]),
        "has_lesion": np.asarray(table["lesion_px"]) > 0,
        "levels": samples.levels,
        "lesion": samples.lesion,
    }


def slice_name(volume: str, index: int) -> str:
    """Return the name of a sample of phase 1; a sample of phase 2 has its volume's name."""
    return f"{volume}:{index:05d}"


def read_volume(file: SampleFile, num_slices: int, num_neighbours: int) -> Rows:
    """Return the slices that the diagnosis reads, levels (1, S, C, H, W), for phase 2."""
    samples = read_samples(storage.read_bytes(file.uri))
    levels = diagnosis_slices(samples, num_slices, num_neighbours, is_continuous=file.is_continuous)
    return _volume_row(file) | {"levels": levels[None]}


def read_features(file: SampleFile) -> Rows:
    """Return the stored features of a volume, for phase 2."""
    features = load_features(storage.read_bytes(file.uri))
    return _volume_row(file) | {name: values[None] for name, values in features.items()}


def _volume_row(file: SampleFile) -> Rows:
    return {
        "name": np.array([file.series]),
        "has_lesion": np.array(file.has_lesion),
        "is_infected": np.array([file.is_infected]),
        "is_severe": np.array([file.is_severe]),
    }

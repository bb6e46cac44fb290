"""Data sets by the name of their layout, with licences and known traps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from covtanet import storage
from covtanet.data import covid20, mosmed, mosmed_mid, stacks
from covtanet.data.labels import LabelledVolume, read_labels
from covtanet.errors import ConfigError

INDEX_SUFFIXES = (".csv", ".parquet")
INDEX_NAMES = ("labels.parquet", "labels.csv")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A layout of labelled volumes."""

    read: Callable[[str], list[LabelledVolume]]
    notes: tuple[str, ...] = ()
    """Licence and known traps, printed with the data report."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Labelled volumes of a data set, and the folder that they lie in."""

    name: str
    """Layout of the data set, or ``images``."""
    volumes: Sequence[LabelledVolume]
    root: str
    """Folder that relative paths refer to."""


def read_index(uri: str) -> list[LabelledVolume]:
    """Read an index: the file itself, or labels.parquet or labels.csv of a folder."""
    if uri.lower().endswith(INDEX_SUFFIXES):
        return read_labels(uri)
    for name in INDEX_NAMES:
        if storage.exists(storage.join(uri, name)):
            return read_labels(storage.join(uri, name))
    raise ConfigError(f"the data set has neither {' nor '.join(INDEX_NAMES)}")


# The name manifest is that of earlier recipes; the file is an index.
DATASETS = {
    "manifest": Dataset(read=read_index),
    "mosmed": Dataset(read=mosmed.read, notes=mosmed.NOTES),
    "mosmed-mid": Dataset(read=mosmed_mid.read, notes=mosmed_mid.NOTES),
    "covid20": Dataset(read=covid20.read, notes=covid20.NOTES),
    "stacks": Dataset(read=stacks.read, notes=stacks.NOTES),
}


def root_of(uri: str) -> str:
    """Return the folder that relative paths refer to, also if the index itself is named."""
    return uri.rpartition("/")[0] if uri.lower().endswith(INDEX_SUFFIXES) else uri


def open_data(dataset: str, data_uri: str) -> DataSource:
    """Return the volumes of a data set of a named layout."""
    return DataSource(name=dataset, volumes=read_volumes(dataset, data_uri), root=root_of(data_uri))


def open_images(images_uri: str, masks_uri: str, intensity: str = "auto") -> DataSource:
    """Return the images of a folder that have a mask in another folder.

    intensity: kind of their values, as in ``LabelledVolume``.
    """
    volumes = stacks.pair(images_uri, masks_uri, intensity)
    return DataSource(name="images", volumes=volumes, root=images_uri)


def read_volumes(dataset: str, uri: str) -> list[LabelledVolume]:
    """Return the volumes of a data set in the order of their paths.

    Raises:
        ConfigError: another layout, or two rows that name one volume.
    """
    volumes = sorted(DATASETS[dataset].read(uri), key=lambda volume: volume.volume_path)
    paths = [volume.volume_path for volume in volumes]
    num_duplicates = len(paths) - len(set(paths))
    if num_duplicates:
        raise ConfigError(f"{num_duplicates} volumes are in the data set twice")
    return volumes

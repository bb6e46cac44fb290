"""The data sets by name: where each keeps its volumes, and what to know before training on it."""

from collections.abc import Callable
from dataclasses import dataclass

from covtanet import storage
from covtanet.data import covid20, mosmed, stacks
from covtanet.data.labels import LabelledVolume, read_labels
from covtanet.errors import ConfigError

MANIFESTS = ("labels.parquet", "labels.csv")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A reader of one layout, and its known traps."""

    read: Callable[[str], list[LabelledVolume]]
    notes: tuple[str, ...] = ()


def read_manifest(uri: str) -> list[LabelledVolume]:
    """Read one's own manifest: the file itself, or a folder with labels.parquet or labels.csv."""
    if uri.lower().endswith((".csv", ".parquet")):
        return read_labels(uri)
    for name in MANIFESTS:
        if storage.exists(storage.join(uri, name)):
            return read_labels(storage.join(uri, name))
    raise ConfigError(f"neither {' nor '.join(MANIFESTS)} in the data's place")


DATASETS = {
    "manifest": Dataset(read=read_manifest),
    "mosmed": Dataset(read=mosmed.read, notes=mosmed.NOTES),
    "covid20": Dataset(read=covid20.read, notes=covid20.NOTES),
    "stacks": Dataset(read=stacks.read, notes=stacks.NOTES),
}


def root_of(uri: str) -> str:
    """What relative paths of a data set are relative to: its folder, also where its manifest is named."""
    return uri.rpartition("/")[0] if uri.lower().endswith((".csv", ".parquet")) else uri


def read_volumes(dataset: str, uri: str) -> list[LabelledVolume]:
    """The volumes of a data set, by path.

    Raises:
        ConfigError: where the layout is another, or two rows name one volume.
    """
    volumes = sorted(DATASETS[dataset].read(uri), key=lambda volume: volume.volume_path)
    paths = [volume.volume_path for volume in volumes]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{len(paths) - len(set(paths))} volumes stand in the data set twice")
    return volumes

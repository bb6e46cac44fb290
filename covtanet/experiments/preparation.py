"""Preparation of labelled volumes on Ray, once, for trainings and evaluations.

What is done stays: a restart reads the descriptions of prepared volumes, not their pixels.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
import ray.data

from covtanet import ray_data, storage
from covtanet.ct.window import WindowConfig
from covtanet.data import prepared_file
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume, prepare, refused, volume_key
from covtanet.data.prepared_file import description_uri, file_uri
from covtanet.data.source import paths_of

logger = logging.getLogger(__name__)

Row = dict[str, Any]
REPORT_EVERY = 50
# Descriptions are small objects: the time goes to waiting for storage.
NUM_FETCH_THREADS = 16


def prepare_volumes(
    volumes: Sequence[LabelledVolume],
    data_uri: str,
    prepared_uri: str,
    window: WindowConfig,
    slice_step_mm: float,
    *,
    refuses_unread: bool = False,
) -> list[PreparedVolume]:
    """Read every volume and its masks, write prepared volumes, return their descriptions.

    refuses_unread: a volume that storage does not give is refused with ``storage``, and the others
    go on. For an evaluation; the folds of a training would be others the next time.
    """
    keys = volume_keys(volumes, data_uri, window, slice_step_mm)
    # One listing tells which volumes are done: a killed preparation continues.
    names = set(storage.list_names(prepared_uri))
    done = [key for key in keys if f"{key}.json" in names]
    descriptions = _read_descriptions(prepared_uri, done)
    rows = [
        {"key": key, **vars(volume)}
        for key, volume in zip(keys, volumes, strict=True)
        if f"{key}.json" not in names
    ]
    logger.info("preparing %d volumes, %d are done already", len(rows), len(done))
    prepare_one = partial(
        prepare_row,
        data_uri=data_uri,
        prepared_uri=prepared_uri,
        window=window,
        slice_step_mm=slice_step_mm,
        refuses_unread=refuses_unread,
    )
    if rows:
        descriptions += _prepare_on_ray(rows, prepare_one)
    # Old and new descriptions in one order, whatever was prepared now.
    return sorted(descriptions, key=lambda volume: volume.key)


def _read_descriptions(prepared_uri: str, keys: Sequence[str]) -> list[PreparedVolume]:
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        texts = pool.map(lambda key: storage.read_bytes(description_uri(prepared_uri, key)), keys)
        return [prepared_file.from_json(text) for text in texts]


def _prepare_on_ray(rows: list[Row], prepare_one: "partial[Row]") -> list[PreparedVolume]:
    ray_data.configure(preserve_order=True)
    # One volume per block: Ray then spreads them over all CPUs.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    descriptions = []
    results = dataset.map(prepare_one, num_cpus=1).iter_rows()
    for number, result in enumerate(results, start=1):
        descriptions.append(prepared_file.from_json(result["description"]))
        if number % REPORT_EVERY == 0:
            logger.info("prepared %d of %d volumes", number, len(rows))
    return descriptions


def volume_keys(
    volumes: Sequence[LabelledVolume], data_uri: str, window: WindowConfig, slice_step_mm: float
) -> list[str]:
    """Return the keys of the prepared volumes, from the listing alone."""
    folders = {_folder(path, data_uri) for volume in volumes for path in paths_of(volume)}
    versions: dict[str, str] = {}
    for folder in folders:
        versions |= _versions(folder)
    return [
        volume_key(volume, _versions_of(volume, data_uri, versions), window, slice_step_mm)
        for volume in volumes
    ]


def _versions(folder: str) -> dict[str, str]:
    """Return size and version of every object below a folder, by its URI."""
    versions = {}
    for _, objects in storage.walk(folder, leaves_root=True):
        for item in objects:
            versions[storage.join(folder, item.path)] = f"{item.num_bytes} {item.version}"
    return versions


def _versions_of(volume: LabelledVolume, data_uri: str, versions: Mapping[str, str]) -> list[str]:
    uris = [storage.resolve(data_uri, path) for path in paths_of(volume)]
    return [versions.get(uri, "missing") for uri in uris]


def _folder(path: str, data_uri: str) -> str:
    """Return the folder to list for a path: the data set, or the folder of an absolute path."""
    resolved = storage.resolve(data_uri, path)
    return resolved.rpartition("/")[0] if resolved == path else data_uri


def prepare_row(
    row: Row,
    data_uri: str,
    prepared_uri: str,
    window: WindowConfig,
    slice_step_mm: float,
    refuses_unread: bool,
) -> Row:
    """Prepare one volume; return its description as JSON.

    An error becomes a refusal. Its text, which may name a study, is left out.

    Raises:
        AccessError: storage refuses our credentials.
        OSError: storage fails, and ``refuses_unread`` is off.
    """
    key = row["key"]
    volume = LabelledVolume(**{name: row[name] for name in LabelledVolume.__dataclass_fields__})
    try:
        description = _prepare_and_write(volume, key, data_uri, prepared_uri, window, slice_step_mm)
    except FileNotFoundError:
        description = refused(volume, key, window, "missing", "not where the data set says")
    except storage.AccessError:
        raise storage.AccessError("the store refuses our credentials") from None
    except OSError as error:
        if not refuses_unread:
            # The key, not the path, which may name a study.
            raise OSError(f"volume {key}: storage: {type(error).__name__}") from None
        description = refused(volume, key, window, "storage", type(error).__name__)
    except Exception as error:
        logger.error("volume %s: internal error, %s", key, type(error).__name__)
        description = refused(volume, key, window, "internal_error", type(error).__name__)
    return {"description": prepared_file.to_json(description)}


def _prepare_and_write(
    volume: LabelledVolume,
    key: str,
    data_uri: str,
    prepared_uri: str,
    window: WindowConfig,
    slice_step_mm: float,
) -> PreparedVolume:
    contents = {
        path: storage.read_bytes(storage.resolve(data_uri, path)) for path in paths_of(volume)
    }
    description, samples = prepare(volume, key, contents, window, slice_step_mm)
    storage.write_bytes(file_uri(prepared_uri, key), prepared_file.to_parquet(description, samples))
    # The description comes last: it says that the volume is done.
    storage.write_bytes(
        description_uri(prepared_uri, key), prepared_file.to_json(description).encode()
    )
    return description

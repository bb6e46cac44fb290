"""An archive in S3 that grows, changes and shrinks every night, and the truth about it.

All series are copies of a few phantoms, so that the first, undisturbed night measures every phantom
and each later copy must come to the same numbers.
"""

import random
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom

from covtanet import storage
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs

# (path in the archive, SeriesInstanceUID or empty): what tells a series from all others.
Identity = tuple[str, str]
NEW_A_NIGHT, CHANGED_A_NIGHT, REMOVED_A_NIGHT = (4, 8), (1, 2), (3, 9)
# Below this number of series the archive only grows, so that its size swings about it.
TYPICAL_SERIES = 50
SEED = 21


@dataclass(frozen=True, kw_only=True)
class Master:
    """One phantom as it is stored.

    name: tells it from the others. files: content by name; the name of a single object is empty.
    suffix: of the path, a slash for a folder.
    """

    name: str
    files: dict[str, bytes] = field(repr=False)
    suffix: str
    series_uid: str
    status: str
    reason: str | None

    def store(self, archive: str, path: str) -> None:
        """Write the series at a path of an archive."""
        for name, data in self.files.items():
            storage.write_bytes(storage.join(archive, f"{path}{name}"), data)


def make_masters(folder: Path, num_sound: int, size_px: int = 128) -> list[Master]:
    """Return sound phantoms, NIfTI and DICOM in turn, and one of each kind of damage."""
    phantoms = list(configs(num_sound, SEED, size_px, num_slices=20))
    truth = write_archive(str(folder / "masters"), str(folder / "truth"), phantoms, 2)
    return [_read_master(folder / "masters", row) for row in truth]


def _read_master(root: Path, row: dict[str, Any]) -> Master:
    path = root / str(row["source_path"])
    if path.is_dir():
        files = {each.name: each.read_bytes() for each in sorted(path.iterdir())}
        header = pydicom.dcmread(BytesIO(next(iter(files.values()))), stop_before_pixels=True)
        suffix, series_uid = "/", str(header.SeriesInstanceUID)
    else:
        files = {"": path.read_bytes()}
        suffix, series_uid = "".join(path.suffixes), ""
    return Master(
        name=str(row["source_path"]),
        files=files,
        suffix=suffix,
        series_uid=series_uid,
        status=str(row["status"]),
        reason=row["reason"] and str(row["reason"]),
    )


class LivingArchive:
    """Copies of masters in S3, changed from night to night.

    present: the series that are there. gone: those that were there before. fresh: those that this
    night must screen, since they are new or changed.
    """

    def __init__(self, uri: str, masters: list[Master], rng: random.Random) -> None:
        self.uri = uri
        self.masters = masters
        self.rng = rng
        self.present: dict[Identity, Master] = {}
        self.gone: dict[Identity, Master] = {}
        self.fresh: set[Identity] = set()
        self._num_added = 0

    def fill(self) -> None:
        """Store each master once."""
        for master in self.masters:
            self._add(master)

    def pass_a_day(self) -> None:
        """Add some series, exchange the content of some, remove some."""
        self.fresh = set()
        before = sorted(self.present)
        for _ in range(self.rng.randint(*NEW_A_NIGHT)):
            self._add(self.rng.choice(self.masters))
        num_removed = 0
        if len(before) > TYPICAL_SERIES:
            num_removed = self.rng.randint(*REMOVED_A_NIGHT)
        chosen = self.rng.sample(before, num_removed + self.rng.randint(*CHANGED_A_NIGHT))
        for identity in chosen[:num_removed]:
            self._remove(identity)
        for identity in chosen[num_removed:]:
            self._exchange(identity)

    def _add(self, master: Master) -> None:
        self._store(master, f"{self._num_added:05d}{master.suffix}")
        self._num_added += 1

    def _store(self, master: Master, path: str) -> None:
        identity = (path, master.series_uid)
        master.store(self.uri, path)
        self.present[identity] = master
        # A DICOM series that comes back as it was is known.
        if self.gone.pop(identity, None) is not master:
            self.fresh.add(identity)

    def _remove(self, identity: Identity) -> None:
        path, _ = identity
        master = self.present.pop(identity)
        self.gone[identity] = master
        for name in master.files:
            storage.delete(storage.join(self.uri, f"{path}{name}"))

    def _exchange(self, identity: Identity) -> None:
        """Put another master of the same form in the place of a series."""
        path, _ = identity
        old = self.present[identity]
        others = [each for each in self.masters if each.suffix == old.suffix and each != old]
        if others:
            self._remove(identity)
            self._store(self.rng.choice(others), path)

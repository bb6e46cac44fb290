"""A night's ledger, and the view over all nights, against the truth about the archive."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.archive import Identity, Master
from covtanet.errors import FAILURE_REASONS, Reason, Status
from covtanet.ledger.diff import MEASUREMENT_TOLERANCE, MEASUREMENTS, PROBABILITIES
from covtanet.ledger.diff import PROBABILITY_TOLERANCE as P_TOLERANCE

Row = dict[str, Any]
# A fault of storage or of a worker may fail a series of a disturbed night; a fault of this software
# never may.
ALLOWED_FAILURES = frozenset(FAILURE_REASONS) - {Reason.INTERNAL_ERROR}
NUMBERS = (*MEASUREMENTS, *PROBABILITIES)


@dataclass
class Expected:
    """The numbers of each master, as the first, undisturbed night measured them.

    numbers: by the master's name.
    """

    numbers: dict[str, Row] = field(default_factory=dict)

    def learn(self, rows: Mapping[Identity, Row], present: Mapping[Identity, Master]) -> None:
        """Take the numbers of screened rows for right."""
        for identity, row in rows.items():
            if row["status"] == Status.SCREENED and identity in present:
                self.numbers[present[identity].name] = {name: row[name] for name in NUMBERS}

    def faults(self, identity: Identity, row: Row, master: Master) -> Iterator[str]:
        """Yield what is wrong with a row that did not fail."""
        found = (row["status"], row["reason"])
        if found != (master.status, master.reason):
            yield f"{identity[0]}: {found}, right is {(master.status, master.reason)}"
            return
        numbers = self.numbers.get(master.name, {})
        for name, right in numbers.items():
            if not _is_equal(name, row[name], right):
                yield f"{identity[0]}: {name} is {row[name]}, the first night had {right}"


def _is_equal(name: str, found: float | None, right: float | None) -> bool:
    if found is None or right is None:
        return found is right
    if name in PROBABILITIES:
        return abs(found - right) <= P_TOLERANCE
    return abs(found - right) <= MEASUREMENT_TOLERANCE * max(abs(found), abs(right))


def by_identity(rows: Iterable[Row], archive: str) -> tuple[dict[Identity, Row], list[str]]:
    """Return the rows by their series, and a line for each series that has more than one."""
    found = [(_identity(row, archive), row) for row in rows]
    counts = Counter(identity for identity, _ in found)
    twice = [f"{path}: {count} rows" for (path, _), count in counts.items() if count > 1]
    return dict(found), twice


def _identity(row: Row, archive: str) -> Identity:
    return str(row["source_uri"]).removeprefix(f"{archive}/"), row["series_uid"] or ""


def check_night(
    rows: Mapping[Identity, Row],
    due: Collection[Identity],
    present: Mapping[Identity, Master],
    expected: Expected,
    *,
    may_fail: bool,
    may_repeat: bool,
) -> list[str]:
    """Return what is wrong with the rows of one night; empty if nothing is.

    due: the series that the night had to screen. may_fail: the night was disturbed, so that
    series may have failed for a fault of storage or of a worker. may_repeat: the store hid earlier
    nights, so that series may have been screened once more.
    """
    faults = [f"{path}: no row" for path, _ in set(due) - rows.keys()]
    allowed = present.keys() if may_repeat else set(due)
    faults += [f"{path}: a row that was not due" for path, _ in rows.keys() - allowed]
    for identity in rows.keys() & allowed:
        row = rows[identity]
        if row["status"] != Status.FAILED:
            faults += expected.faults(identity, row, present[identity])
        elif not may_fail or row["reason"] not in ALLOWED_FAILURES:
            faults.append(f"{identity[0]}: failed, {row['reason']}")
    return sorted(faults)


def check_view(
    view: Mapping[Identity, Row],
    present: Mapping[Identity, Master],
    gone: Mapping[Identity, Master],
    expected: Expected,
) -> list[str]:
    """Return what is wrong with the newest rows of all series that ever were in the archive.

    A row that failed was judged in its own night.
    """
    everything = {**gone, **present}
    faults = [f"{path}: not in the view" for path, _ in everything.keys() - view.keys()]
    faults += [f"{path}: in the view only" for path, _ in view.keys() - everything.keys()]
    for identity in view.keys() & everything.keys():
        if view[identity]["status"] != Status.FAILED:
            faults += expected.faults(identity, view[identity], everything[identity])
    return sorted(faults)

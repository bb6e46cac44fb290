"""The cost of a million series from measured figures and the reader's own prices.

python -m benchmarks.cost [--series 1000000] [--objects 197] [--megabytes 39] [--node-hour PRICE]

Prices are in any one currency. The defaults are examples, not offers: replace them by those of your
provider. docs/scale.md says where the measured figures come from.
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields
from typing import Any

SECONDS_PER_HOUR = 3600
OBJECTS_PER_LISTING = 1000
DAYS_PER_MONTH = 30


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The series to screen. The defaults are ricord-1a-001012, 197 slices of 512 x 512."""

    series: int = 1_000_000
    """Number of series."""
    objects: int = 197
    """Objects per series; 1 for NIfTI."""
    megabytes: float = 39.0
    """Bytes of a series as it is stored, in 10^6."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured on two cores; the files under benchmarks/ name the processor."""

    seconds: float = 3.0
    """Wall seconds per series on one node, `real_size`."""
    cores: int = 2
    """Cores of that node."""
    requests_beside: float = 0.001
    """Requests for ledger and work per series of a long run, `scale`."""
    requests_per_run: int = 70
    """Requests for ledger and work that every run has, `scale`."""
    row_bytes: int = 250
    """Bytes of a ledger row, compressed: assumed for real names. Rows of `million` have 89."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of a provider; the defaults are examples."""

    node_hour: float = 0.384
    """One node for an hour."""
    node_cores: int = 8
    """Cores of such a node."""
    thousand_reads: float = 0.0004
    """1,000 GET requests."""
    thousand_writes: float = 0.005
    """1,000 PUT or LIST requests."""
    gigabyte_read: float = 0.0
    """Transfer of 10^9 bytes from the store; often nothing within a region."""
    gigabyte_month: float = 0.023
    """10^9 bytes of the ledger for a month."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line of the bill."""

    name: str
    amount: float
    unit: str
    price: float

    @property
    def cost(self) -> float:
        """Amount times price."""
        return self.amount * self.price


def bill(archive: Archive, measured: Measured, prices: Prices) -> list[Item]:
    """Return the lines of the bill of one screening of the archive."""
    core_seconds = archive.series * measured.seconds * measured.cores
    num_objects = archive.series * archive.objects
    # An object of a series of many is read twice: its header, to find the series, and the whole.
    num_reads = num_objects * (1 if archive.objects == 1 else 2)
    num_listings = math.ceil(num_objects / OBJECTS_PER_LISTING)
    num_writes = archive.series * measured.requests_beside + measured.requests_per_run
    return [
        Item(
            name="nodes",
            amount=core_seconds / prices.node_cores / SECONDS_PER_HOUR,
            unit=f"hours of {prices.node_cores} cores",
            price=prices.node_hour,
        ),
        Item(name="reads", amount=num_reads / 1000, unit="1,000", price=prices.thousand_reads),
        Item(
            name="listings and writes",
            amount=(num_listings + num_writes) / 1000,
            unit="1,000",
            price=prices.thousand_writes,
        ),
        Item(
            name="bytes read",
            amount=archive.series * archive.megabytes / 1000,
            unit="GB",
            price=prices.gigabyte_read,
        ),
        Item(
            name="ledger, a month",
            amount=archive.series * measured.row_bytes / 1e9,
            unit="GB",
            price=prices.gigabyte_month,
        ),
    ]


def table(items: list[Item]) -> str:
    """Return the bill as a Markdown table."""
    lines = ["| | amount | unit | price | cost |", "|---|---|---|---|---|"]
    for item in items:
        amount = f"{item.amount:,.1f} | {item.unit} | {item.price:g}"
        lines.append(f"| {item.name} | {amount} | {item.cost:,.2f} |")
    total = sum(item.cost for item in items)
    return "\n".join([*lines, f"| in all | | | | {total:,.2f} |"])


def main() -> int:
    """Print the bill."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = (Archive, Measured, Prices)
    for kind in kinds:
        for field in fields(kind):
            name = f"--{field.name.replace('_', '-')}"
            options.add_argument(name, type=type(field.default), default=field.default)
    values = vars(options.parse_args())

    def chosen(kind: type[Any]) -> Any:
        return kind(**{field.name: values[field.name] for field in fields(kind)})

    print(table(bill(chosen(Archive), chosen(Measured), chosen(Prices))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

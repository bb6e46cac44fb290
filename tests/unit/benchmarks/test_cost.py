"""The bill of a screening, worked by hand."""

import pytest

from benchmarks.cost import Archive, Measured, Prices, bill

MEASURED = Measured(seconds=3.6, cores=2, requests_beside=0.01, requests_per_run=100, row_bytes=500)
PRICES = Prices(
    node_hour=0.5,
    node_cores=4,
    thousand_reads=0.1,
    thousand_writes=2.0,
    gigabyte_read=0.01,
    gigabyte_month=1.0,
)


def test_bill_of_dicom_counts_two_reads_an_object() -> None:
    archive = Archive(series=10_000, objects=200, megabytes=50)
    costs = {item.name: (item.amount, item.cost) for item in bill(archive, MEASURED, PRICES)}
    # 10,000 x 3.6 s x 2 cores / 4 cores = 18,000 s.
    assert costs["nodes"] == pytest.approx((5.0, 2.5))
    assert costs["reads"] == pytest.approx((4000.0, 400.0))
    # 2,000 listings, 100 + 100 writes.
    assert costs["listings and writes"] == pytest.approx((2.2, 4.4))
    assert costs["bytes read"] == pytest.approx((500.0, 5.0))
    assert costs["ledger, a month"] == pytest.approx((0.005, 0.005))


def test_bill_of_nifti_counts_one_read_a_series() -> None:
    archive = Archive(series=10_000, objects=1, megabytes=50)
    (reads,) = (item for item in bill(archive, MEASURED, PRICES) if item.name == "reads")
    assert reads.amount == 10

"""The record of one series between the stages and in the ledger."""

from dataclasses import replace

from screened_series import new_record

from covtanet.errors import QcFlag, Reason, Status
from covtanet.ledger.record import Refusal, ScreeningRecord

REFUSAL = Refusal(status=Status.REJECTED, reason=Reason.NO_LUNG, detail="no lung")


def test_record_survives_its_columns() -> None:
    for record in (
        new_record(),
        new_record(involvement=0.25, qc_flags=(QcFlag.PADDING, QcFlag.OBLIQUE)),
        new_record(source_digest="d").refused(REFUSAL),
    ):
        columns = {**record.to_columns(), "slices": None}
        assert ScreeningRecord.from_columns(columns) == record


def test_columns_hold_plain_text_for_parquet() -> None:
    columns = new_record(qc_flags=(QcFlag.PADDING,)).refused(REFUSAL).to_columns()
    values = (columns["status"], columns["reason"], *columns["qc_flags"])
    assert values == ("rejected", "no_lung", "padding")
    assert {type(value) for value in values} == {str}


def test_refused_record_loses_its_numbers_and_keeps_flags_digest_and_times() -> None:
    record = new_record(
        num_slices=40, spacing_z_mm=2.5, p_infected=0.9, p_severe=0.1, decode_s=1.0,
        source_digest="d", qc_flags=(QcFlag.PADDING,),
    )  # fmt: skip
    refused = record.refused(REFUSAL)
    expected = replace(
        record, status=Status.REJECTED, reason=Reason.NO_LUNG, reason_detail="no lung",
        num_slices=None, spacing_z_mm=None, p_infected=None, p_severe=None,
    )  # fmt: skip
    assert refused == expected


def test_flag_stands_once() -> None:
    record = new_record().with_flag(QcFlag.PADDING).with_flag(QcFlag.PADDING)
    assert record.qc_flags == (QcFlag.PADDING,)


def test_identity_keeps_only_fields_of_the_listing() -> None:
    record = new_record(num_slices=40, qc_flags=(QcFlag.PADDING,), series_uid="1.2")
    assert record.identity() == new_record(series_uid="1.2")

"""Diagnosis and severity of a measured series, from the network or from the involvement."""

from dataclasses import replace

from covtanet.errors import QcFlag
from covtanet.ledger.record import ScreeningRecord
from covtanet.model.description import infected_by_burden
from covtanet.screening.config import ScreeningConfig


def conclude(record: ScreeningRecord, config: ScreeningConfig) -> ScreeningRecord:
    """Return a measured record with diagnosis and severity.

    config: with the model's values, see ``for_model``. Null is whatever model or lungs do not allow
    to say; the severity of a normal series; and ``p_severe`` unless the series is infected.
    """
    involvement = record.involvement
    by_involvement = None
    if involvement is not None:
        by_involvement = _severity(involvement > config.severe_involvement)
    record = replace(record, severity_by_involvement=by_involvement)
    if record.p_infected is None:
        return _conclude_by_burden(record, config)
    p_severe = record.p_severe
    record = _with_diagnosis(record, config)
    if record.diagnosis == "normal" or p_severe is None:
        return replace(record, p_severe=None)
    return replace(record, severity=_severity(p_severe >= config.severe_threshold))


def _conclude_by_burden(record: ScreeningRecord, config: ScreeningConfig) -> ScreeningRecord:
    """Return a record with the diagnosis that follows from the involvement, if there is one.

    The severity of an infected series is that by the paper's rule.
    """
    p_infected = infected_by_burden(config.burden, record.involvement)
    if p_infected is None:
        return record
    flags = tuple(flag for flag in record.qc_flags if flag != QcFlag.NO_DIAGNOSIS)
    record = replace(record, p_infected=p_infected, qc_flags=flags)
    record = _with_diagnosis(record.with_flag(QcFlag.DIAGNOSIS_BY_BURDEN), config)
    if record.diagnosis == "normal":
        return record
    return replace(record, severity=record.severity_by_involvement)


def _with_diagnosis(record: ScreeningRecord, config: ScreeningConfig) -> ScreeningRecord:
    assert record.p_infected is not None
    is_infected = record.p_infected >= config.infected_threshold
    return replace(record, diagnosis="infected" if is_infected else "normal")


def _severity(is_severe: bool) -> str:
    return "severe" if is_severe else "mild"

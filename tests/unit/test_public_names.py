"""The public interface."""

import pytest

import covtanet

PUBLIC = {
    "ConfigError", "CovtanetError", "Predictor", "QcFlag", "Reason", "SavedModel",
    "ScreeningConfig", "Status", "StudyError", "Volume", "load_model", "read_ledger",
    "read_volume", "screen_study",
}  # fmt: skip


def test_public_names_are_frozen() -> None:
    assert set(covtanet.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(covtanet, name).__name__ == name


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = covtanet.unknown

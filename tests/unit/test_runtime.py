"""Exit codes of the commands: every error ends with the code that the runbook names."""

import argparse
import logging

import pytest
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayActorError

from covtanet.errors import (
    AlreadyCommittedError,
    CheckpointError,
    ConfigError,
    TrainingError,
    error_location,
)
from covtanet.runtime import ExitCode, cause_of, describe_exit, run_command, run_job
from covtanet.storage import AccessError

CANARY = "Doe^Jane"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("window 5..5 HU is empty"), 3, "window 5..5 HU is empty"),
        (CheckpointError("digest differs"), 3, "digest differs"),
        (AlreadyCommittedError("another driver"), 5, "another driver"),
        (TrainingError("the worker died"), 1, "the worker died; the same command continues"),
        (FloatingPointError("loss is NaN"), 1, "loss is NaN; change the learning rate or the seed"),
        (OSError(CANARY), 1, "storage: OSError; the same command continues"),
        (AccessError(CANARY), 1, "storage: AccessError; the same command continues"),
        (ValueError(CANARY), 1, "internal error, ValueError at"),
        (RayActorError(), 1, "Ray: RayActorError; the same command continues"),
        (
            ExecutionTimeoutError(CANARY),
            1,
            "Ray: ExecutionTimeoutError; the same command continues",
        ),
    ],
)
def test_error_ends_with_its_exit_code(
    error: Exception, code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def job() -> int:
        raise error

    with caplog.at_level(logging.INFO):
        assert run_job(job) == code
    assert message in caplog.text
    assert f"exit code {code}: {describe_exit(code)}" in caplog.text
    # Texts of storage's errors and of unexpected errors may name a study.
    assert CANARY not in caplog.text


def test_code_of_a_job_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("covtanet.runtime.start_logging", lambda: None)
    arguments = argparse.Namespace(code=ExitCode.BELOW_BOUND)
    with caplog.at_level(logging.INFO):
        assert run_command(lambda given: given.code, arguments) == 4
    assert "exit code 4: done, but the result is outside its limits" in caplog.text


def test_cause_of_worker_error_is_named_by_its_type() -> None:
    text = f"traceback\ncovtanet.errors.AccessError: {CANARY}"
    assert cause_of(RuntimeError(text)) == "RuntimeError of AccessError"
    assert cause_of(RuntimeError("other")) == "RuntimeError"


def test_error_location_is_the_last_line_of_the_package_without_the_text() -> None:
    with pytest.raises(ValueError, match="99") as raised:
        describe_exit(99)
    assert error_location(raised.value).startswith("ValueError at runtime.py:")
    assert error_location(KeyError(CANARY)) == "KeyError at no line of covtanet"

"""A Ray whose head has died before the job joins it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from saved_models import small_model
from screening_runs import CONFIG

from covtanet.model.saved_model import save_model
from infra.local.jobs import start_job
from infra.local.services import LOOPBACK, free_ports

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_job_says_that_ray_does_not_answer_and_ends(
    tmp_path: Path, module_environment: dict[str, str], seen: Callable[[str], None]
) -> None:
    """Ray itself would wait a quarter of an hour."""
    save_model(tmp_path / "model", small_model())
    (tmp_path / "screening.toml").write_text(CONFIG)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.nii").write_bytes(b"no volume")
    (port,) = free_ports(1)
    environment = {
        **module_environment, "RAY_ADDRESS": f"{LOOPBACK}:{port}", "RAY_AUTH_MODE": "token",
    }  # fmt: skip
    job = start_job(
        environment, "screen.py", "--archive", str(tmp_path / "archive"), "--ledger",
        str(tmp_path / "ledger"), "--model", str(tmp_path / "model"), "--config",
        str(tmp_path / "screening.toml"),
    )  # fmt: skip
    assert job.finish(300) == 1, job.output
    assert "the Ray of RAY_ADDRESS does not answer; the same command continues" in job.output
    seen("exit code 1")

"""Fixtures of ``make faults``: a Ray for each suite, and a table of the outcomes seen."""

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from infra.local.services import ROOT, start_ray, write_private


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Record the outcome seen; the session's end prints it beside the test's name."""
    return partial(record_property, "seen")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a table: fault and outcome seen."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            summary = dict(report.user_properties).get("seen", outcome)
            if report.when == "call" and "/faults/" in report.nodeid:
                rows.append(f"| {report.nodeid.partition('::')[2]} | {summary} | {outcome} |")
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line("| fault | seen | |\n|---|---|---|\n" + "\n".join(rows))


@pytest.fixture(scope="module")
def module_environment() -> Iterator[dict[str, str]]:
    """Return ``os.environ``, restored after the module: its S3 server is the tests' own as well."""
    before = dict(os.environ)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def own_ray(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[dict[str, str]], dict[str, str]]]:
    """Return a function that starts a Ray with some variables, and returns the
    environment of jobs.
    """
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    write_private(token, secrets.token_hex(32))
    with ExitStack() as stack:

        def start(variables: dict[str, str]) -> dict[str, str]:
            # Ray's sockets need a short path.
            short = stack.enter_context(tempfile.TemporaryDirectory(prefix="cov"))
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            # Jobs import this checkout, also if another one is installed.
            environment = {"PATH": path, "PYTHONPATH": str(ROOT), **variables}
            ray = start_ray(folder / "ray.log", environment, token, Path(short))
            stack.callback(ray.stop)
            return {**os.environ, **environment, **ray.environment}

        yield start

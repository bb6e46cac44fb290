"""A script in a process of its own, such as one that starts a Ray beside that of other tests."""

import json
import subprocess
import sys
from typing import Any

from repository import ROOT

NUM_CHARACTERS = 2000


def output_of(script: str, *arguments: object, timeout_s: float = 120) -> Any:
    """Run Python code; return the JSON of the last line that it prints.

    It sees the arguments as ``sys.argv[1:]``. A script that fails is an AssertionError.
    """
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-NUM_CHARACTERS:]
    return json.loads(done.stdout.splitlines()[-1])

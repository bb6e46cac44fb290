"""The version of this software that runs and models are marked with."""

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = Path(__file__).parents[1]


def software_version() -> str:
    """Return the package's version, with the commit if it runs from a checkout."""
    base = _installed_version()
    if shutil.which("git") is None:
        return base
    for folder in _possible_checkouts():
        if commit := _commit_of(folder):
            return f"{base}+g{commit}"
    return base


def _installed_version() -> str:
    try:
        return version("covtanet")
    except PackageNotFoundError:
        return "0"


def _possible_checkouts() -> list[Path]:
    """Return the package's folder and, of an install from a folder, that folder."""
    folders = [PACKAGE]
    try:
        text = distribution("covtanet").read_text("direct_url.json")
    except PackageNotFoundError:
        return folders
    if text:
        url = urlsplit(json.loads(text)["url"])
        if url.scheme == "file":
            folders.append(Path(unquote(url.path)))
    return folders


def _commit_of(folder: Path) -> str:
    """Return the commit of a checkout, marked if it has changes; empty without a checkout."""
    # --exclude '*' leaves tags out, so that the commit's digest is always there.
    options = ["--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    described = subprocess.run(
        ["git", "-C", folder, "describe", *options], capture_output=True, text=True, check=False
    )
    return described.stdout.strip().replace("-", ".") if described.returncode == 0 else ""

"""Write infra/image/requirements.txt: the image's packages by version and by hashes of wheels.

make lock     after every change of constraints.txt or of the dependencies in pyproject.toml

The metadata of .venv says which distributions the image needs on Linux, x86_64 and aarch64;
constraints.txt says their versions; uv asks the package index for the hashes (its own default
index, or the one that UV_DEFAULT_INDEX names). Source distributions are left out: installing one
would run its setup.py. torch and torchvision come from another index, see infra/Containerfile.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PROJECT, EXTRAS = "covtanet", frozenset({"imagenet"})
OTHER_INDEX = {"torch", "torchvision"}
PYTHON = (3, 11)
MACHINES = ("x86_64", "aarch64")
# Wheels for any glibc of 2.x: the base image decides which of them pip takes.
PLATFORMS = [
    "manylinux2014",
    "manylinux2010",
    "manylinux1",
    *(f"manylinux_2_{minor}" for minor in range(5, 60)),
]
HEADER = """\
# Made by `make lock` from constraints.txt, not by hand. Hashes are those of every wheel for CPython
# 3.11 on Linux, x86_64 and aarch64. torch and torchvision come from an index of their own, see
# infra/Containerfile.
"""


def main() -> int:
    """Write the file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--uv", type=Path, required=True, help="the uv program")
    arguments = options.parse_args()
    if sys.version_info[:2] != PYTHON:
        raise SystemExit(
            f"this is Python {sys.version.split()[0]}, expected that of the image, 3.11"
        )
    pins = read_pins()
    missing = sorted(name for name in closure() - pins.keys())
    if missing:
        raise SystemExit(
            f"constraints.txt has no version of {', '.join(missing)}, which the image needs"
        )
    requirements = [f"{name}=={pins[name]}" for name in sorted(closure() - OTHER_INDEX)]
    entries = [entry(package) for package in ask_uv(arguments.uv, requirements)]
    REQUIREMENTS.write_text(HEADER + "".join(sorted(entries)))
    print(f"{len(entries)} distributions in {REQUIREMENTS.relative_to(ROOT)}")
    return 0


def read_pins() -> dict[str, str]:
    """Version by canonical name; setuptools, which `pip freeze` leaves out, at the version that is
    installed.
    """
    lines = [line.partition("==") for line in CONSTRAINTS.read_text().splitlines()]
    pins: dict[str, str] = {canonicalize_name(name): version for name, _, version in lines}
    return {"setuptools": metadata.version("setuptools"), **pins}


def closure() -> set[str]:
    """Canonical names of all that the project needs in the image, itself left out."""
    waiting: list[tuple[str, frozenset[str]]] = [(PROJECT, EXTRAS)]
    seen = set(waiting)
    while waiting:
        new = direct(*waiting.pop()) - seen
        seen |= new
        waiting.extend(new)
    return {name for name, _ in seen} - {PROJECT}


def direct(name: str, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """Distributions that one names, with the extras that it asks of them."""
    named: set[tuple[str, frozenset[str]]] = set()
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        if applies(requirement, extras):
            named.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return named


def applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Whether a requirement holds on one of the machines."""
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate(
            {"extra": extra, "platform_machine": machine, "sys_platform": "linux"}
        )
        for extra in extras | {""}
        for machine in MACHINES
    )


def ask_uv(uv: Path, requirements: list[str]) -> list[dict[str, Any]]:
    """The packages of a pylock.toml (PEP 751) of these requirements alone, with all their files."""
    with tempfile.TemporaryDirectory() as folder:
        given, lock = Path(folder) / "requirements.in", Path(folder) / "pylock.toml"
        given.write_text("\n".join(requirements) + "\n")
        command = [
            str(uv.absolute()),
            "pip",
            "compile",
            "--quiet",
            "--no-config",
            "--no-deps",
            "--universal",
        ]
        command += [
            "--format",
            "pylock.toml",
            "--python-version",
            "3.11",
            "--output-file",
            str(lock),
            str(given),
        ]
        subprocess.run(command, check=True, cwd=folder)
        packages: list[dict[str, Any]] = tomllib.loads(lock.read_text())["packages"]
    return packages


def entry(package: dict[str, Any]) -> str:
    """A requirement with the hashes of its wheels."""
    tags = supported_tags()
    hashes = set()
    for wheel in package.get("wheels", ()):
        file_name = wheel.get("name") or wheel["url"].rsplit("/", 1)[-1]
        if parse_wheel_filename(file_name)[3] & tags:
            hashes.add(wheel["hashes"]["sha256"])
    if not hashes:
        raise SystemExit(
            f"{package['name']} {package['version']} has no wheel for CPython 3.11 on Linux"
        )
    lines = [
        f"{package['name']}=={package['version']}",
        *(f"    --hash=sha256:{digest}" for digest in sorted(hashes)),
    ]
    return " \\\n".join(lines) + "\n"


def supported_tags() -> set[Tag]:
    """Tags of wheels that CPython 3.11 installs on Linux."""
    platforms = [
        f"{platform}_{machine}" for platform in [*PLATFORMS, "linux"] for machine in MACHINES
    ]
    return {
        *cpython_tags(PYTHON, ["cp311"], platforms),
        *compatible_tags(PYTHON, "cp311", platforms),
    }


if __name__ == "__main__":
    sys.exit(main())

"""The container image: every package by version and hash, a base by digest, bytecode of the
project.
"""

import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

IMAGE = ROOT / "infra" / "image" / "requirements.txt"
FROM_TORCHS_INDEX = {"torch", "torchvision"}


def constraints() -> dict[str, str]:
    """Version by name."""
    pins = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in pins}


def locked() -> dict[str, list[str]]:
    """What follows the name in each requirement of the image: version, then hashes."""
    text = IMAGE.read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for requirement, *hashes in lines:
        name, _, version = requirement.partition("==")
        assert name not in found
        found[name] = [version, *hashes]
    return found


def required(name: str, extras: set[str], machine: str) -> set[tuple[str, frozenset[str]]]:
    """Distributions that an installed one needs on Linux with Python 3.11."""
    found: set[tuple[str, frozenset[str]]] = set()
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        for extra in extras | {""}:
            environment = {
                "extra": extra,
                "sys_platform": "linux",
                "platform_machine": machine,
                "python_version": "3.11",
            }
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """Every distribution that the image needs for one, itself left out unless something refers to
    it.
    """
    waiting, seen = [(name, extras)], {(name, extras)}
    while waiting:
        each, wanted = waiting.pop()
        for machine in ("x86_64", "aarch64"):
            new = required(each, set(wanted), machine) - seen
            seen |= new
            waiting += new
    return {each for each, _ in seen} - {name}


def test_image_installs_every_distribution_by_version_and_hash() -> None:
    found, pins = locked(), constraints()
    assert not FROM_TORCHS_INDEX & set(found)
    for name, (version, *hashes) in found.items():
        assert version == pins.get(name, version), name
        assert hashes, name
        for each in hashes:
            assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each), name


def test_image_adds_setuptools_to_the_constraints() -> None:
    # pip freeze names no setuptools, which builds our own package and which torch needs.
    assert set(locked()) - set(constraints()) == {"setuptools"}
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert Requirement(build).specifier.contains(locked()["setuptools"][0])


def test_image_installs_required_distributions_only() -> None:
    assert set(locked()) == needed("covtanet", frozenset({"imagenet"})) - FROM_TORCHS_INDEX


def commands(containerfile: str) -> list[str]:
    """Instructions of a Containerfile, each in one line."""
    lines = [line for line in containerfile.splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def test_image_installs_by_hash_and_torch_by_index() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    installs = [each for line in found for each in re.findall(r"pip install [^&]*", line)]
    by_hash, torch, ours = installs
    assert "--require-hashes --no-deps" in by_hash
    assert "--only-binary :all:" in by_hash  # a source distribution would run its setup.py
    assert by_hash.split()[-2:] == ["-r", "requirements.txt"]
    assert '--index-url "$TORCH_INDEX"' in torch
    assert "'^torch(vision)?==' constraints.txt" in torch
    assert "--no-index --no-deps --no-build-isolation" in ours
    for path in (ROOT / "infra" / "Containerfile", ROOT / "Makefile", IMAGE):
        assert "--extra-index-url" not in path.read_text()


def test_image_base_needs_a_digest() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    assert found[:2] == ["ARG BASE", "FROM ${BASE}"]  # no default: who builds names it
    (check,) = [line for line in found if "@sha256:" in line]
    assert check.startswith("RUN ")
    assert "ALLOW_TAG" in check
    assert found.index(check) < found.index(next(line for line in found if "apt-get" in line))


def test_image_compiles_the_project() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    (compiled,) = [index for index, line in enumerate(found) if "compileall" in line]
    copies = [index for index, line in enumerate(found) if line.startswith("COPY")]
    assert "/opt/covtanet" in found[compiled]
    assert compiled > max(copies)


def test_make_test_prints_skip_reasons() -> None:
    """Of pytest's short summary, which -q does not hide; the Makefile passes no -r of its own that
    would replace it.
    """
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"][
        "addopts"
    ]
    (shown,) = re.findall(r"-r(\w+)", options)
    assert set(shown) >= set("fEs")
    assert not re.search(r"pytest.* -r", (ROOT / "Makefile").read_text())

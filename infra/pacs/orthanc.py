"""Orthanc as a service: started on loopback with authentication, filled, and stopped.

Orthanc is GPL and its DICOMweb plug-in AGPL. Both are programs of their own, which Debian has as
``orthanc`` and ``orthanc-dicomweb``; nothing of them is part of this package.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import requests

from infra.local.services import LOOPBACK, Service, free_ports, wait_for, write_private

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
CONFIGURATION = Path(__file__).with_name("orthanc.json")
USER = "covtanet"
INSTALL = "apt-get install orthanc orthanc-dicomweb"
TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Orthanc:
    """A running Orthanc."""

    service: Service
    url: str
    password: str

    @property
    def archive(self) -> str:
        """URI of its DICOMweb root, as ``--archive`` takes it."""
        return f"dicomweb+{self.url}/dicom-web"

    def request(self, method: str, path: str, data: bytes | None = None) -> requests.Response:
        """Ask Orthanc's own interface, which loads and deletes.

        Raises:
            requests.HTTPError: it refuses.
        """
        answer = requests.request(
            method, f"{self.url}/{path}", data=data, auth=(USER, self.password), timeout=TIMEOUT_S
        )
        answer.raise_for_status()
        return answer

    def load(self, objects: Iterable[bytes]) -> None:
        """Store DICOM objects."""
        for content in objects:
            self.request("POST", "instances", content)


def is_installed() -> bool:
    """Return whether Orthanc and its DICOMweb plug-in are there."""
    return bool(shutil.which("Orthanc")) and PLUGIN.exists()


def start_orthanc(
    folder: Path, password: str, port: int = 0, stable_age_s: int | None = None
) -> Orthanc:
    """Start Orthanc with its files in a folder.

    port: 0 takes a free one. stable_age_s: seconds after which a study that does not change counts
    as stable; None for those of the configuration.
    """
    port = port or free_ports(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(CONFIGURATION.read_text()) | {
        "HttpPort": port,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "RegisteredUsers": {USER: password},
        "Plugins": [str(PLUGIN)],
    }
    if stable_age_s is not None:
        settings["StableAge"] = stable_age_s
    configuration = folder / "orthanc.json"
    write_private(configuration, json.dumps(settings))
    log = folder / "orthanc.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            ["Orthanc", str(configuration)], stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://{LOOPBACK}:{port}"
    environment = {"COVTANET_DICOMWEB_USER": USER, "COVTANET_DICOMWEB_PASSWORD": password}
    orthanc = Orthanc(service=Service(process, environment, log), url=url, password=password)
    wait_for(orthanc.service, lambda: _answers(orthanc))
    return orthanc


def _answers(orthanc: Orthanc) -> bool:
    try:
        orthanc.request("GET", "system")
    except requests.RequestException:
        return False
    return True

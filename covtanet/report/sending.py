"""The DICOM objects of a screened series on their way to a DICOMweb server, by STOW-RS."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

import pydicom

from covtanet import storage
from covtanet.errors import Reason, StudyError
from covtanet.report.series_results import KEY_IMAGE_PREFIX, SEG, SR
from covtanet.storage import dicomweb

SENT = "sent"
SENT_ALREADY = "sent already"
REFUSED = "refused"
IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


@dataclass(frozen=True, kw_only=True)
class ResultObject:
    """One object to send. name: that of its file, by which outcomes name it."""

    name: str
    study_uid: str
    series_uid: str
    uid: str
    data: bytes

    @property
    def series_path(self) -> str:
        """Path of its series below the server's root."""
        return dicomweb.series_path(self.study_uid, self.series_uid)

    @property
    def kind(self) -> str:
        """SEG, SR or key image with its number."""
        number = self.name.removeprefix(KEY_IMAGE_PREFIX).partition(".")[0]
        return {SEG: "SEG", SR: "SR"}.get(self.name, f"key image {number}")


def send_results(folder: str, server: str) -> tuple[str, str]:
    """Send the objects of a results folder as ``send_objects`` does."""
    names = [name for name in storage.list_names(folder) if is_result(name)]
    return send_objects(
        ((name, storage.read_bytes(storage.join(folder, name))) for name in names), server
    )


def is_result(name: str) -> bool:
    """Return whether a file of a results folder is a DICOM object."""
    return name in (SEG, SR) or name.startswith(KEY_IMAGE_PREFIX)


def send_objects(objects: Iterable[tuple[str, bytes]], server: str) -> tuple[str, str]:
    """Send the objects of one series in one request, apart from those that the server holds.

    Returns ``sent``, ``sent already`` or ``refused``, and for the log the objects that were refused
    with their failure reasons (PS3.18, table 10.5.3-1).

    Raises:
        StudyError: ``unreadable``, the source has a UID that is none.
        OSError: the server refuses the request or does not answer.
    """
    identified = [_identified(name, data) for name, data in objects]
    # One search for each of the three series, not for each object.
    series = {item.series_path for item in identified}
    stored = {uid for path in series for uid in dicomweb.stored_uids(server, path)}
    missing = [item for item in identified if item.uid not in stored]
    if not missing:
        return SENT_ALREADY, ""
    failures = dicomweb.store(server, missing[0].study_uid, [item.data for item in missing])
    if not failures:
        return SENT, ""
    refused = [item for item in missing if item.uid in failures]
    named = [f"{item.kind} 0x{failures[item.uid]:04x}" for item in refused]
    return REFUSED, ", ".join(named) or "an object that was not sent"


def _identified(name: str, data: bytes) -> ResultObject:
    header = pydicom.dcmread(BytesIO(data), specific_tags=list(IDENTIFIERS))
    uids = [str(header.get(keyword, "")) for keyword in IDENTIFIERS]
    # They become the path of a request.
    if not all(map(dicomweb.is_uid, uids)):
        raise StudyError(Reason.UNREADABLE, "the UID of the study is invalid")
    study_uid, series_uid, uid = uids
    return ResultObject(name=name, study_uid=study_uid, series_uid=series_uid, uid=uid, data=data)

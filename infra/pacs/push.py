"""Screen every study that a PACS receives, as soon as it is complete.

python -m infra.pacs.push --orthanc URL --endpoint URL --state FILE [--once]

For routers that can only send by C-STORE: they send to an Orthanc in front of the endpoint. Orthanc
writes down what changes; this program reads its list of changes, and for every study that has been
stable for a while asks the endpoint to screen it by its DICOMweb URI and to store the results back.
The number of the last change that was dealt with stands in the state file, so that nothing is lost
if this program or the endpoint stops. Results that come back make a study change once more; a study
whose CT is the same as before is not screened again.

Not a Lua script within Orthanc: its requests would wait for Orthanc, which waits for the script.

The environment holds the passwords: COVTANET_DICOMWEB_USER and COVTANET_DICOMWEB_PASSWORD (or
_PASSWORD_FILE) for Orthanc, COVTANET_TOKEN (or COVTANET_TOKEN_FILE) for the endpoint, whose caller
needs Orthanc among its ``places`` and ``may_store = true``. Both addresses are loopback or https.

Research use only, not a medical device.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from covtanet import runtime, storage
from covtanet.errors import ConfigError
from covtanet.storage.dicomweb_server import Credentials, open_session

logger = logging.getLogger(__name__)

POLL_S = 5.0
CHANGES_AT_A_TIME = 100
ANSWER_TIMEOUT_S = 600
# The endpoint answers 503 with Retry-After while it is busy.
MAX_RETRIES, BACKOFF_S, MAX_RETRY_AFTER_S = 8, 1.0, 60
# Of a study that the endpoint answers with a fault; then the next one comes.
MAX_TRIES = 3
# Orthanc leaves metadata from 1024 on to its users.
SCREENED = "metadata/1024"
DICOMWEB_ROOT = "/dicom-web"


def main(argv: Sequence[str] | None = None) -> int:
    """Follow the changes until the program is ended."""
    options = argparse.ArgumentParser(
        prog="infra.pacs.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--orthanc", required=True, help="such as http://127.0.0.1:8042")
    options.add_argument("--endpoint", required=True, help="such as http://127.0.0.1:8000")
    options.add_argument("--state", required=True, type=Path, help="file with the last change")
    options.add_argument("--once", action="store_true", help="stop after the last change")
    arguments = options.parse_args(argv)
    runtime.start_logging()
    try:
        push = Push(arguments.orthanc, arguments.endpoint, arguments.state)
        return push.follow(is_once=arguments.once)
    except ConfigError as error:
        logger.error("%s", error)
        return runtime.ExitCode.REFUSED


@dataclass
class Change:
    """An entry of Orthanc's list of changes."""

    number: int
    kind: str
    resource: str


class Push:
    """Orthanc's changes and the endpoint that screens them."""

    def __init__(self, orthanc: str, endpoint: str, state: Path) -> None:
        """Check the addresses and read the state.

        Raises:
            ConfigError: an address in clear text beyond loopback, or credentials are missing.
        """
        self.orthanc = orthanc.rstrip("/")
        self.endpoint = endpoint.rstrip("/")
        self.archive = storage.absolute(f"dicomweb+{self.orthanc}{DICOMWEB_ROOT}")
        storage.absolute(f"dicomweb+{self.endpoint}")  # the same rule for its token
        self.state = state
        self.last_change = int(state.read_text()) if state.exists() else 0
        self.num_tries = 0
        self.session = open_session(
            os.environ,
            max_retries=MAX_RETRIES,
            backoff_s=BACKOFF_S,
            max_retry_after_s=MAX_RETRY_AFTER_S,
        )
        self.credentials = Credentials(os.environ)
        self.token = _token()

    def follow(self, *, is_once: bool = False) -> int:
        """Deal with one change after the other. is_once: return after the last one.

        Raises:
            ConfigError: Orthanc or the endpoint refuses the credentials.
        """
        while True:
            has_more = False
            try:
                has_more = self.next_changes()
                if is_once and not has_more and not self.num_tries:
                    return runtime.ExitCode.DONE
            except requests.RequestException as error:  # its text quotes the URL
                logger.error("no answer (%s); trying again", type(error).__name__)
            if not has_more:
                time.sleep(POLL_S)

    def next_changes(self) -> bool:
        """Deal with some changes; return whether there are more of them by now."""
        query = f"changes?since={self.last_change}&limit={CHANGES_AT_A_TIME}"
        answer = self.ask_orthanc("GET", query).json()
        for entry in answer["Changes"]:
            change = Change(entry["Seq"], entry["ChangeType"], entry["ID"])
            if change.kind == "StableStudy" and not self.deal_with(change):
                return False
            self.num_tries = 0
            self.last_change = change.number
            self.state.write_text(str(change.number))
        return not answer["Done"]

    def deal_with(self, change: Change) -> bool:
        """Screen a study unless its CT was screened; return False to try again."""
        study = self.ask_orthanc("GET", f"studies/{change.resource}", missing_is_none=True)
        if study is None:
            logger.info("change %d: the study is gone", change.number)
            return True
        content = self.content_of(change.resource)
        if not content:
            logger.info("change %d: no CT in the study", change.number)
            return True
        noted = self.ask_orthanc(
            "GET", f"studies/{change.resource}/{SCREENED}", missing_is_none=True
        )
        if noted is not None and noted.text == content:
            logger.info("change %d: the CT of the study was screened before", change.number)
            return True
        if not self.screen(change, study.json()["MainDicomTags"]["StudyInstanceUID"]):
            return False
        self.ask_orthanc("PUT", f"studies/{change.resource}/{SCREENED}", content)
        return True

    def content_of(self, study: str) -> str:
        """Return a digest of the CT series of a study and their instances; empty without CT."""
        series = self.ask_orthanc("GET", f"studies/{study}/series").json()
        ct = [one for one in series if one["MainDicomTags"].get("Modality") == "CT"]
        listed = sorted([one["ID"], *sorted(one["Instances"])] for one in ct)
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest() if ct else ""

    def screen(self, change: Change, study_uid: str) -> bool:
        """Ask the endpoint to screen a study and store its results; return False to try again."""
        body = {"uri": f"{self.archive}/studies/{study_uid}", "store_results": True}
        answer = self.session.post(
            f"{self.endpoint}/v1/studies:by-uri",
            data=json.dumps(body),
            headers={
                "Authorization": f"Bearer {self.token}",
                "Content-Type": "application/json",
            },
            timeout=ANSWER_TIMEOUT_S,
        )
        outcome = _outcome(answer)
        if answer.status_code in (401, 403):  # of every study
            raise ConfigError(
                f"the endpoint answers {answer.status_code} {outcome}, expected a token whose "
                "caller has this Orthanc in places and may_store = true"
            )
        logger.info("change %d: %d %s", change.number, answer.status_code, outcome)
        # The study's own fault: once more would be the same.
        if answer.ok or answer.status_code in (413, 422):
            return True
        self.num_tries += 1
        if self.num_tries < MAX_TRIES:
            return False
        logger.error("change %d: given up after %d tries", change.number, self.num_tries)
        return True

    def ask_orthanc(
        self, method: str, path: str, data: str | None = None, *, missing_is_none: bool = False
    ) -> Any:
        """Send a request to Orthanc's own interface.

        Raises:
            requests.RequestException: it does not answer, or refuses.
        """
        answer = self.session.request(
            method,
            f"{self.orthanc}/{path}",
            data=data,
            auth=self.credentials,
            timeout=ANSWER_TIMEOUT_S,
        )
        if answer.status_code == requests.codes.unauthorized:
            raise ConfigError("Orthanc refuses the credentials")
        if missing_is_none and answer.status_code == requests.codes.not_found:
            return None
        answer.raise_for_status()
        return answer


def _token() -> str:
    """Return the endpoint's token.

    Raises:
        ConfigError: there is none.
    """
    path = os.environ.get("COVTANET_TOKEN_FILE")
    token = Path(path).read_text().strip() if path else os.environ.get("COVTANET_TOKEN", "")
    if not token:
        raise ConfigError("COVTANET_TOKEN or COVTANET_TOKEN_FILE is missing")
    return token


def _outcome(answer: requests.Response) -> str:
    """Return the statuses of a study's series and of its results, or the reason of a refusal."""
    try:
        content = answer.json()
    except ValueError:
        return "no JSON"
    series = content.get("series")
    if not series:
        return str(content.get("reason"))
    statuses = [str(row["reason"] or row["status"]) for row in series]
    sent = [f"results {result['outcome']}" for result in content.get("results") or ()]
    return ", ".join([*statuses, *sent])


if __name__ == "__main__":
    sys.exit(main())

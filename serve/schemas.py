"""Bodies of requests and answers, with the examples of the API's description."""

from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

MAX_LIMIT = 10_000_000

EXAMPLE_ROW: dict[str, Any] = {
    "series_key": "5d1f3c0e8a6b4f7d9c2e1a0b3c4d5e6f",
    "status": "screened",
    "reason": None,
    "qc_flags": [],
    "num_slices": 36,
    "p_infected": 0.98,
    "diagnosis": "infected",
    "p_severe": 0.2,
    "severity": "mild",
    "severity_by_involvement": "mild",
    "lesion_volume_ml": 310.5,
    "lung_volume_ml": 4890.1,
    "involvement": 0.063,
    "model_digest": "9f2c" * 16,
    "config_digest": "3ab1" * 16,
    "software_version": "0.1.0+g4f461455ab12",
    "engine": "openvino-int8",
}


class Strict(BaseModel):
    """A body in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """A refusal: a stable code, and a sentence that quotes nothing of the request."""

    reason: str = Field(examples=["unsupported_media"])
    message: str = Field(
        examples=["expected a .nii, a .nii.gz, a DICOM object or a zip of DICOM objects"]
    )


class Model(BaseModel):
    """The version of the model that answered."""

    name: str = Field(examples=["covtanet"])
    version: str = Field(examples=["3"])
    digest: str = Field(examples=["9f2c" * 16])


class SeriesRow(BaseModel):
    """A series in the columns of the ledger; columns about a run of the screening job are null."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [EXAMPLE_ROW]})

    series_key: str = Field(
        description="digest of path and series UID: the same series has the same key"
    )
    status: Literal["screened", "rejected", "failed"]
    reason: str | None = Field(
        default=None, description="code of docs/input.md, if the series was not screened"
    )
    model_name: str | None = None
    model_version: str | None = None
    model_digest: str = Field(
        description="SHA-256 of weights and description of the model that answered"
    )
    config_digest: str = Field(
        description="SHA-256 of window and screening configuration, as the screening job has it"
    )
    software_version: str = Field(description="version and commit of the software that answered")
    engine: str | None = Field(
        default=None,
        description="inference engine and precision that ran the network, if it was run",
    )


class SeriesResults(BaseModel):
    """What became of the DICOM results of a screened DICOM series: SEG, SR and key images."""

    series_key: str
    outcome: str = Field(
        description="made; if they were to be stored: sent, sent already or refused; else the "
        "reason why there are none, see covtanet export --help and docs/input.md",
        examples=["sent"],
    )
    detail: str = Field(
        default="",
        description="objects that the server refused, with its failure reasons (PS3.18)",
        examples=["SEG 0xa700"],
    )


class StudyAnswer(BaseModel):
    """The series of a study in the columns of the ledger.

    Research use only, not a medical device.
    """

    model: Model
    series: list[SeriesRow]
    reason: str | None = Field(
        default=None, description="reason of the first series, if no series was screened"
    )
    results: list[SeriesResults] | None = Field(
        default=None, description="there if the request asked for DICOM results"
    )
    research_use_only: Literal[True] = True


class UriRequest(Strict):
    """A study in storage: a NIfTI object, the prefix of a DICOM series, or a study or series of a
    DICOMweb server.

    store_results: send SEG, SR and key images to the DICOMweb server that the study came from.
    """

    uri: str = Field(
        examples=[
            "s3://hospital/ct/study-17/",
            "dicomweb+https://pacs.hospital/dicom-web/studies/1.2.3",
        ],
        max_length=1024,
    )
    store_results: bool = Field(
        default=False,
        description="send SEG, SR and key images to the DICOMweb server that the study came from",
    )


class BatchRequest(Strict):
    """A request to screen an archive with ``jobs/screen.py``.

    run_date: today if null, else at most a day from today. model: the model of the endpoint if
    empty, else a model that its configuration allows.
    """

    archive: str = Field(examples=["s3://hospital/ct"], max_length=1024)
    run_date: date | None = Field(default=None, examples=["2026-11-23"])
    model: str = Field(
        default="",
        pattern=r"^(models:/[\w.-]+(@[\w.-]+|/\d+))?$",
        examples=["models:/covtanet@champion"],
    )
    since: Literal["", "last"] = ""
    group_by: Literal["", "folder", "uid"] = ""
    limit: int = Field(default=0, ge=0, le=MAX_LIMIT)

    @field_validator("run_date")
    @classmethod
    def _is_near(cls, run_date: date | None) -> date | None:
        today = datetime.now(UTC).date()
        if run_date is not None and abs(run_date - today) > timedelta(days=1):
            raise PydanticCustomError("date_too_far", "expected today, or a day before or after it")
        return run_date


class StudyLabels(BaseModel):
    """Names by which a hospital knows the study of a series; null if the PACS has none."""

    accession_number: str | None = Field(examples=["A1234567"])
    study_date: str | None = Field(examples=["2026-01-31"], description="ISO 8601")


class SourceSeries(BaseModel):
    """Slices of a series at the PACS, from base to apex."""

    num_slices: int = Field(examples=[197])
    instance_numbers: list[int | None] = Field(
        description="one per slice, of an Enhanced CT its frame; null if the PACS has none"
    )


class BatchState(BaseModel):
    """State and progress of a batch.

    counts: rows by status, once the batch is committed. exit_code: of its last job.
    """

    batch_id: str = Field(examples=["1f0c9a7e5b3d2468"])
    state: Literal["waiting", "running", "committed", "failed", "cancelled", "interrupted"]
    run_id: str | None = None
    submitted_at: str
    archive: str
    run_date: date
    model: str = ""
    since: str = ""
    group_by: str = ""
    limit: int = 0
    series: int | None = None
    finished: int | None = None
    per_minute: float | None = None
    seconds_left: float | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    exit_code: int | None = Field(
        default=None, description="see jobs/screen.py; 124: the job passed its time limit"
    )

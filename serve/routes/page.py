"""The worklist page and its files, which need no token; the page asks for the token itself."""

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse

from covtanet.report.page_file import PAGE

router = APIRouter()

PageFile = Literal[
    "dom.js",
    "format.js",
    "full_resolution.js",
    "list.js",
    "main.js",
    "pacs.js",
    "source.js",
    "study.js",
    "summary.js",
    "tiles.js",
    "viewer.js",
    "worklist.css",
]


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(PAGE / "index.html")


@router.get("/worklist/{name}", include_in_schema=False)
async def page_file(name: PageFile) -> FileResponse:
    """Return a module or the style sheet of the page."""
    return FileResponse(PAGE / name)

"""The worklist page and its files, which need no token; the page asks for the token itself."""

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse

from covtanet.report import worklist

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(worklist.PAGE / "index.html")


@router.get("/worklist/{name}", include_in_schema=False)
async def page_part(name: Literal["worklist.js", "worklist.css"]) -> FileResponse:
    """Return a script or the style of the page."""
    return FileResponse(worklist.PAGE / name)

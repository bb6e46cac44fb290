"""The worklist page as one HTML file that needs no server and no network.

A browser loads no module of a ``file:`` page, so the modules are put into the page itself.
"""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
MAIN = "main.js"
STYLE_TAG = '<link rel="stylesheet" href="worklist/worklist.css">'
SCRIPT_TAG = '<script type="module" src="worklist/main.js"></script>'
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(async )?(function|class|const) )", re.MULTILINE)
LEFT_OVER = re.compile(r"^(import|export)\b", re.MULTILINE)


def render_page(data: dict[str, Any]) -> str:
    """Return the page with its style, its modules and the data that ``source.js`` reads."""
    # Within a script element "<" could end it or open another.
    embedded = json.dumps(data).replace("<", "\\u003c")
    text = (PAGE / "index.html").read_text()
    text = _replace(text, STYLE_TAG, f"<style>\n{(PAGE / 'worklist.css').read_text()}</style>")
    return _replace(
        text,
        SCRIPT_TAG,
        f'<script id="data" type="application/json">{embedded}</script>\n'
        f'<script type="module">\n{bundle(MAIN)}</script>',
    )


def bundle(name: str) -> str:
    """Return a module of the page and all that it imports as one module.

    The modules share one scope, so no two of them may declare the same name; the browser refuses
    the script otherwise.

    Raises:
        ValueError: a module imports or exports in another form than ``import {...} from "./x.js"``
            and ``export function|class|const``.
    """
    sources: dict[str, str] = {}
    _collect(name, sources)
    text = "".join(sources.values())
    if LEFT_OVER.search(text) or "</script" in text:
        raise ValueError("a module of the page has an import or export that cannot be bundled")
    return text


def _collect(name: str, sources: dict[str, str]) -> None:
    """Add a module behind the modules that it imports."""
    if name in sources:
        return
    source = (PAGE / name).read_text()
    for imported in IMPORT.findall(source):
        _collect(imported, sources)
    sources[name] = EXPORT.sub("", IMPORT.sub("", source))


def _replace(text: str, tag: str, replacement: str) -> str:
    before, marker, after = text.partition(tag)
    if not marker:
        raise ValueError(f"the page has no {tag}")
    return before + replacement + after

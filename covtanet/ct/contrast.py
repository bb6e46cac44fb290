"""Whether a contrast agent was given, from the words and codes of a CT image."""

import re
from typing import Any

import pydicom
from pydicom.dataset import Dataset

# What is left once letters and digits are all that counts: "W/O CONTRAST" is "W O CONTRAST", "-" is
# nothing.
NO_AGENT = re.compile(
    r"(N|NO|NON|NONE|NIL|NULL|NA|N A|0|FALSE|WITHOUT|W O|WO|WOUT|NC|NEG(ATIVE)?|UNKNOWN|UNSPECIFIED|UNENHANCED"
    r"|NATIVE?|NATIVO|NATIVA|PLAIN|BLANK|SANS|SIN|SENZA|SEM|OHNE|KEINE?[SNMR]?"
    r"|NOT (GIVEN|USED|APPLICABLE|APPLIED|ADMINISTERED|SPECIFIED|ENHANCED|KNOWN|INJECTED|PERFORMED|ENTERED|DONE))"
    r"( (IV|I V|ORAL|ANY|OR|CONTRAST\w*|KONTRAST\w*|CONSTRASTE|PRODUIT|PRODUCT|DE|MDC|MC|KM|CM|CE|AGENTS?|MEDIUM|MEDIA"
    r"|BOLUS|DYE|ENHANCE\w*|INJECTION|INJECTED|INIEZIONE|GIVEN|USED|ADMINISTERED|APPLIED|CT|SCAN|STUDY|SERIES|EXAM"
    r"|PHASE|THORAX|CHEST))*|NONCONTRAST|NONENHANCED"
)

MINUS = {"C-", "-C", "CM-", "KM-", "IV-"}


def names_agent(text: str) -> bool:
    """Whether the words name a contrast agent, or say that one was given."""
    if text.strip().upper() in MINUS:
        return False
    words = " ".join(re.findall(r"[^\W_]+", text.upper()))
    return bool(words) and NO_AGENT.fullmatch(words) is None


def has_contrast(header: Dataset) -> bool:
    """Whether a slice was taken with a contrast agent.

    An Enhanced CT lists the agents of all its frames (PS3.3 C.7.6.4b) and says of each frame which
    of them had been administered; an agent of which it says nothing was.
    """
    if names_agent(str(header.get("ContrastBolusAgent") or "")):
        return True
    agents = [item for item in _items(header, "ContrastBolusAgentSequence") if _is_agent(item)]
    usages = _items(header, "ContrastBolusUsageSequence")
    for agent in agents:
        number = _number(agent)
        own = [usage for usage in usages if number is None or _number(usage) in (None, number)]
        if not own or any(_is_used(usage) for usage in own):
            return True
    return False


def _is_agent(item: Dataset) -> bool:
    return names_agent(str(item.get("CodeMeaning") or item.get("CodeValue") or ""))


def _is_used(usage: Dataset) -> bool:
    said = [
        str(usage.get(f"ContrastBolusAgent{what}") or "").strip().upper()
        for what in ("Administered", "Detected")
    ]
    return "YES" in said or said == ["", ""]


def _number(item: Dataset) -> int | None:
    value: Any = item.get("ContrastBolusAgentNumber")
    return value if isinstance(value, int) else None


def _items(header: Dataset, name: str) -> list[Dataset]:
    items = header.get(name)
    return list(items) if isinstance(items, pydicom.Sequence) else []

"""Contrast agents of a CT image, by its words and codes."""

import re
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from covtanet.ct.dicom_objects import read_text
from covtanet.ct.dicom_values import value_of

# Texts that name no agent, once only letters and digits count: "W/O CONTRAST" is "W O CONTRAST" and
# "-" is empty.
NO_AGENT = re.compile(
    r"(N|NO|NON|NONE|NIL|NULL|NA|N A|0|FALSE|WITHOUT|W O|WO|WOUT|NC|NEG(ATIVE)?|UNKNOWN"
    r"|UNSPECIFIED|UNENHANCED|NATIVE?|NATIVO|NATIVA|PLAIN|BLANK|SANS|SIN|SENZA|SEM|OHNE"
    r"|KEINE?[SNMR]?"
    r"|NOT (GIVEN|USED|APPLICABLE|APPLIED|ADMINISTERED|SPECIFIED|ENHANCED|KNOWN|INJECTED|PERFORMED"
    r"|ENTERED|DONE))"
    r"( (IV|I V|ORAL|ANY|OR|CONTRAST\w*|KONTRAST\w*|CONSTRASTE|PRODUIT|PRODUCT|DE|MDC|MC|KM|CM|CE"
    r"|AGENTS?|MEDIUM|MEDIA|BOLUS|DYE|ENHANCE\w*|INJECTION|INJECTED|INIEZIONE|GIVEN|USED"
    r"|ADMINISTERED|APPLIED|CT|SCAN|STUDY|SERIES|EXAM|PHASE|THORAX|CHEST))*"
    r"|NONCONTRAST|NONENHANCED"
)

MINUS = {"C-", "-C", "CM-", "KM-", "IV-"}


def names_agent(text: str) -> bool:
    """Return whether the words name a contrast agent, or say that one was given."""
    if text.strip().upper() in MINUS:
        return False
    words = " ".join(re.findall(r"[^\W_]+", text.upper()))
    return bool(words) and NO_AGENT.fullmatch(words) is None


def has_contrast(header: Dataset) -> bool:
    """Return whether a slice was taken with a contrast agent.

    An Enhanced CT lists the agents of all its frames (PS3.3 C.7.6.4b), and in each frame the usage
    of them; an agent without usage counts as administered.
    """
    if names_agent(str(value_of(header, "ContrastBolusAgent") or "")):
        return True
    agents = [item for item in _items(header, "ContrastBolusAgentSequence") if _is_agent(item)]
    usages = _items(header, "ContrastBolusUsageSequence")
    return any(_is_administered(agent, usages) for agent in agents)


def _is_agent(item: Dataset) -> bool:
    return names_agent(str(value_of(item, "CodeMeaning") or value_of(item, "CodeValue") or ""))


def _is_administered(agent: Dataset, usages: list[Dataset]) -> bool:
    number = _number(agent)
    usages_of_agent = usages
    if number is not None:
        usages_of_agent = [usage for usage in usages if _number(usage) in (None, number)]
    return not usages_of_agent or any(_is_used(usage) for usage in usages_of_agent)


def _is_used(usage: Dataset) -> bool:
    administered = read_text(usage, "ContrastBolusAgentAdministered").upper()
    detected = read_text(usage, "ContrastBolusAgentDetected").upper()
    return "YES" in (administered, detected) or administered == detected == ""


def _number(item: Dataset) -> int | None:
    value: Any = value_of(item, "ContrastBolusAgentNumber")
    return value if isinstance(value, int) else None


def _items(header: Dataset, name: str) -> list[Dataset]:
    items = value_of(header, name)
    return list(items) if isinstance(items, pydicom.Sequence) else []

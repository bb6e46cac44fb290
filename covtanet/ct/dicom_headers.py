"""The series that a DICOM object belongs to, from its first bytes, without a DICOM parser.

A flat scan: elements are skipped by their lengths, and only sequences of undefined length are
walked, within a budget. So a header costs at most a fraction of a second, whatever it holds, and
only two UIDs of it are kept.

An object begins with a preamble and the magic, or, without them, with its file meta or data set.

Not covered: command elements (group 0000) before the data set, which stored objects do not have.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC_AT, MAGIC = 128, b"DICM"
META_GROUP = b"\x02\x00"
# Media Storage SOP Instance UID and Transfer Syntax UID.
INSTANCE_ELEMENT, SYNTAX_ELEMENT = b"\x03\x00", b"\x10\x00"
# Media Storage SOP Class UID (0002,0002) of a DICOMDIR, within the first elements of the file meta.
DIRECTORY = b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10"
DIRECTORY_WITHIN = 512
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
# Value representations with a length of 4 bytes after 2 reserved bytes (PS3.5, 7.1.2); the length
# of all others has 2 bytes.
LONG_VRS = frozenset((
    b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV",
))  # fmt: skip
SHORT_VRS = frozenset((
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
))  # fmt: skip
VRS = SHORT_VRS | LONG_VRS
# The first elements tell an object without preamble from other files: their tags rise from one of
# these groups, and their values are not longer than those of any CT.
FIRST_GROUPS, NUM_FIRST_ELEMENTS, MAX_FIRST_BYTES = (0x0002, 0x0008), 3, 1 << 16
STUDY_UID, SERIES_UID = 0x0020000D, 0x0020000E
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED_LENGTH = 0xFFFFFFFF
MAX_INFLATED_BYTES = 4 << 20
# A CT header has some 100 elements before its series UID. A scan of 100,000 takes 0.1 s on a core.
MAX_ELEMENTS, MAX_META_ELEMENTS, MAX_DEPTH = 100_000, 1000, 64
UID_TEXT = re.compile(r"[0-9.]{1,64}")
INVALID_UID_TEXT = re.compile(r"invalid-[0-9a-f]{16}")


@dataclass(frozen=True)
class SeriesIdentity:
    """The UIDs that tell which series an object belongs to."""

    study_uid: str | None
    series_uid: str


def has_magic(header: bytes) -> bool:
    """Return whether an object's first bytes carry the DICOM magic."""
    return header[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def data_start(data: bytes) -> int:
    """Return the byte at which the file meta begins, or the data set if there is no file meta.

    Without a preamble that is 0, or 4 if a writer left out the preamble but not the magic.
    """
    if has_magic(data):
        return MAGIC_AT + len(MAGIC)
    return len(MAGIC) if data.startswith(MAGIC) else 0


def looks_like_dicom(header: bytes) -> bool:
    """Return whether an object begins as DICOM does.

    Either with the magic, or with elements as a CT has them first. Three elements settle it, so
    that other files cost next to nothing.
    """
    if has_magic(header):
        return True
    at = data_start(header)
    scan = _Scan(header, None, at)
    is_implicit = scan.looks_implicit(at)
    last_tag = num_sound = 0
    while num_sound < NUM_FIRST_ELEMENTS and at + scan.implicit.size <= len(header):
        representation = header[at + 4 : at + 6]
        if not is_implicit and representation not in VRS:
            return False
        if representation in LONG_VRS and not is_implicit and at + 12 > len(header):
            break
        tag, length, at = scan.element(at, is_implicit)
        if tag <= last_tag or (not num_sound and tag >> 16 not in FIRST_GROUPS):
            return False
        if length == UNDEFINED_LENGTH:
            return num_sound > 0
        if length > MAX_FIRST_BYTES:
            return False
        # The data set after the file meta may be in another encoding, or deflated: one element of
        # the file meta has to do. It is always explicit.
        if tag >> 16 == FIRST_GROUPS[0]:
            return not is_implicit
        last_tag = tag
        num_sound += 1
        at += length
    return num_sound > 0


def is_directory(header: bytes) -> bool:
    """Return whether an object is a DICOMDIR by its file meta, whatever its name."""
    return DIRECTORY in header[:DIRECTORY_WITHIN]


def transfer_syntax(data: bytes) -> tuple[str | None, int]:
    """Return an object's transfer syntax and the start of its data set, from the file meta.

    Nothing is inflated; a parser would inflate a deflated object before its syntax can be checked.
    Without file meta the syntax is None.

    Raises:
        ValueError: the file meta has more elements than any real one.
    """
    return _meta_text(data, SYNTAX_ELEMENT)


def instance_uid(header: bytes) -> str:
    """Return the UID of an instance from its file meta; empty if it is missing."""
    try:
        return _meta_text(header, INSTANCE_ELEMENT)[0] or ""
    except ValueError:
        return ""


def _meta_text(data: bytes, element: bytes) -> tuple[str | None, int]:
    """Return the text of an element of the file meta, and the start of the data set."""
    at = data_start(data)
    text = None
    for _ in range(MAX_META_ELEMENTS):
        if data[at : at + 2] != META_GROUP or at + 12 > len(data):
            return text, at
        is_long = data[at + 4 : at + 6] in LONG_VRS
        start = at + (12 if is_long else 8)
        length_bytes = data[at + 8 : at + 12] if is_long else data[at + 6 : at + 8]
        length = int.from_bytes(length_bytes, "little")
        if data[at + 2 : at + 4] == element:
            text = data[start : start + length].decode("ascii", "replace").strip("\0 ")
        at = start + length
    raise ValueError(f"the file meta has more than {MAX_META_ELEMENTS} elements")


def read_identities(headers: Iterable[bytes], header_bytes: int) -> list[SeriesIdentity | None]:
    """Return the UIDs of objects from their first bytes.

    header_bytes: how many bytes were read of each object; fewer are a whole object.
    """
    return [read_identity(header, is_whole=len(header) < header_bytes) for header in headers]


def read_identity(header: bytes, *, is_whole: bool = False) -> SeriesIdentity | None:
    """Return the UIDs of an object from its first bytes; None if they are unreadable or not there.

    is_whole: ``header`` is all of the object.
    """
    if not looks_like_dicom(header):
        return None
    try:
        syntax, start = transfer_syntax(header)
        if syntax == DEFLATED:
            stream = zlib.decompressobj(-zlib.MAX_WBITS)
            header = stream.decompress(header[start:], MAX_INFLATED_BYTES)
            start = 0
            is_whole = is_whole and stream.eof
        uids, is_past = _Scan(header, syntax, start).uids(start)
    except (ValueError, struct.error, zlib.error):
        return None
    # Unless an element follows or the object ends, the value may have been cut.
    if not uids.get(SERIES_UID) or not (is_past or is_whole):
        return None
    study_uid = uids.get(STUDY_UID)
    return SeriesIdentity(
        _clean_uid(study_uid) if study_uid else None, _clean_uid(uids[SERIES_UID])
    )


class _Scan:
    """A walk over the elements of a data set, in the encoding of its syntax and first element."""

    def __init__(self, data: bytes, syntax: str | None, start: int) -> None:
        self.data = data
        self.num_left = MAX_ELEMENTS
        is_big = syntax == BIG_ENDIAN
        if syntax is None:
            # As pydicom guesses: in the right byte order the first group is a small number.
            is_big = not self.looks_implicit(start) and data[start + 1 : start + 2] >= b"\x04"
        order = ">" if is_big else "<"
        self.explicit = struct.Struct(f"{order}HH2sH")
        self.implicit = struct.Struct(f"{order}HHI")
        self.long_length = struct.Struct(f"{order}I")

    def uids(self, at: int) -> tuple[dict[int, str], bool]:
        """Return the text of the UIDs by tag, and whether the scan saw an element after them."""
        uids: dict[int, str] = {}
        is_implicit = self.looks_implicit(at)
        while at + self.implicit.size <= len(self.data):
            tag, length, at = self.element(at, is_implicit)
            if tag > SERIES_UID:
                return uids, tag != ITEM_END
            if length == UNDEFINED_LENGTH:
                at = self.after_sequence(at, is_implicit)
                continue
            if tag in (STUDY_UID, SERIES_UID):
                if at + length > len(self.data):
                    break
                uids[tag] = self.data[at : at + length].decode("latin-1").rstrip("\0 ").strip()
            at += length
        return uids, False

    def looks_implicit(self, at: int) -> bool:
        """Return whether the element here lacks the two capitals of a value representation."""
        return not all(0x41 <= letter <= 0x5A for letter in self.data[at + 4 : at + 6])

    def element(self, at: int, is_implicit: bool) -> tuple[int, int, int]:
        """Return tag, length and start of the value of the element here.

        A representation that is not two capitals means implicit VR.
        """
        self.num_left -= 1
        if self.num_left < 0:
            raise ValueError(f"more than {MAX_ELEMENTS} elements before the UIDs")
        if not is_implicit:
            group, number, representation, length = self.explicit.unpack_from(self.data, at)
            tag = group << 16 | number
            if representation in LONG_VRS:
                return tag, self.long_length.unpack_from(self.data, at + 8)[0], at + 12
            if b"AA" <= representation <= b"ZZ":
                return tag, length, at + 8
        group, number, length = self.implicit.unpack_from(self.data, at)
        return group << 16 | number, length, at + 8

    def after_sequence(self, at: int, is_implicit: bool) -> int:
        """Return the position after a sequence of undefined length; its first item begins here."""
        is_sequence = True
        # Sequences and items that have not ended, the outermost first.
        unfinished = [(is_sequence, is_implicit)]
        while unfinished:
            is_sequence, is_implicit = unfinished[-1]
            tag, length, at = self.element(at, is_implicit or is_sequence)
            if tag == (SEQUENCE_END if is_sequence else ITEM_END):
                unfinished.pop()
            elif is_sequence and tag != ITEM:
                raise ValueError("a sequence holds elements that are not items")
            elif length != UNDEFINED_LENGTH:
                at += length
            elif len(unfinished) == MAX_DEPTH:
                raise ValueError(f"sequences are nested more than {MAX_DEPTH // 2} deep")
            else:
                # In the item of an explicit sequence some writers go on in implicit VR.
                is_next_implicit = is_implicit or (is_sequence and self.looks_implicit(at))
                unfinished.append((not is_sequence, is_next_implicit))
        return at


def _clean_uid(text: str) -> str:
    """Return a valid UID as it is, and a digest of any other text, which may name a patient."""
    if UID_TEXT.fullmatch(text):
        return text
    return f"invalid-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

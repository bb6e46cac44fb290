"""A child that lies: the parent checks every value of an answer before it uses it."""

import json
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from covtanet.ct.dicom_headers import SeriesIdentity
from covtanet.ct.window import WindowConfig
from covtanet.decoding import child_process, headers, process
from covtanet.decoding.child_process import HEADER_READER, Child
from covtanet.decoding.process import Limits
from covtanet.decoding.sandbox import Sandbox
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.errors import DecoderError, StudyError

LIMITS = Limits(memory_mib=256, timeout_s=20)
# A process that speaks the protocol, and gives the answer that a test asks for.
LIAR = """
import json, os, struct, sys, zlib
requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
answers.write(b'{"missing_confinement": []}\\n'); answers.flush()
while line := requests.readline():
    request = json.loads(line)
    while requests.read(1) == b"\\x01":
        while length := int.from_bytes(requests.read(4), "little"):
            requests.read(length)
    mask_header = {
        "shape": [12, 64, 64], "is_partial": False, "source_shape": [64, 64, 12],
        "source_affine": [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        "spacing_mm": [22.0, 5.5, 5.5], "has_known_spacing": True,
    }
    chosen, bits, row, reply = [1, 5], bytes(2 * 12 * 64 * 64 // 8), ["1.2", "1.2.3"], None
    header = {"nonce": request["nonce"], "num_slices": 12, "qc_flags": ["oblique"]}
    header["spacing_mm"] = [22.0, 5.5, 5.5]
    LIE
    masks = json.dumps(mask_header).encode() + b"\\n" + zlib.compress(bits)
    body = json.dumps([row]).encode()
    lengths = {"num_chosen": len(chosen), "mask_bytes": len(masks), "num_bytes": len(body)}
    answers.write(json.dumps({**lengths, **header}).encode() + b"\\n" if reply is None else reply)
    if request["kind"] == "headers":
        answers.write(body)
    else:
        answers.write(struct.pack(f"<{len(chosen)}q", *chosen))
        answers.write(bytes(len(chosen) * 32 * 32 * 2) + masks)
    answers.flush()
"""


def liar(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """Let every child be such a process, which does not end by itself."""
    monkeypatch.setattr(child_process, "DEATH_S", 0.2)
    code = LIAR.replace("LIE", lie).replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(process, "CODE", code)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    liar_sandbox = Sandbox(WindowConfig(size_px=32), 2.5, LIMITS)
    yield liar_sandbox
    liar_sandbox.close()


def test_sound_answer_is_accepted(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    liar(monkeypatch, "pass")
    prepared = sandbox("dicom", [[b"x"]])
    assert (prepared.num_slices, prepared.chosen.tolist(), prepared.qc_flags) == (
        12,
        [1, 5],
        ("oblique",),
    )
    assert StoredMasks.unpack(prepared.masks).lungs.lung_mask.shape == (12, 64, 64)


def test_sound_answer_of_unknown_spacing_is_accepted(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    flags = ["unknown_spacing", "blank_slices", "implausible_lungs"]
    liar(monkeypatch, f"mask_header['has_known_spacing'] = False; header['qc_flags'] = {flags}")
    prepared = sandbox("nifti", [[b"x"]])
    assert prepared.qc_flags == tuple(flags)
    assert StoredMasks.unpack(prepared.masks).voxel_ml is None


BOTH_SPACINGS = "header['spacing_mm'] = mask_header['spacing_mm'] = "
REFUSAL = "header = {{'nonce': request['nonce'], 'reason': {}, 'message': ''}}"
LIES = {
    "another request's nonce": "header['nonce'] = '0' * 32",
    "no nonce": "del header['nonce']",
    "a flag nobody knows": "header['qc_flags'] = ['DOE^JOHN']",
    "a flag that is a list": "header['qc_flags'] = [['oblique']]",
    "a million million slices": "header['num_slices'] = 10**12",
    "no slices": "header['num_slices'] = 0",
    "slices as text": "header['num_slices'] = '12'",
    "slices as truth": "header['num_slices'] = True",
    "a missing key": "del header['spacing_mm']",
    "no spacing": "header['spacing_mm'] = [22.0, 0.0, 5.5]",
    "infinite spacing": BOTH_SPACINGS + "[22.0, float('inf'), 5.5]",
    "NaN spacing": BOTH_SPACINGS + "[22.0, float('nan'), 5.5]",
    "two spacings": "header['spacing_mm'] = [22.0, 5.5]",
    "slices chosen twice": "chosen = [1, 1]",
    "slices chosen backwards": "chosen = [5, 1]",
    "a slice before the first": "chosen = [-1, 5]",
    "a slice behind the last": "chosen = [1, 12]",
    "none chosen": "header['num_chosen'] = 0",
    "more chosen than there are": "header['num_chosen'] = 13",
    "masks of a negative length": "header['mask_bytes'] = -1",
    "masks that fill the memory": "header['mask_bytes'] = 1 << 40",
    "masks of another volume": "mask_header['shape'] = [11, 64, 64]",
    "masks of another source": "mask_header['source_shape'] = [64, 64, 13]",
    "masks with another spacing": "mask_header['spacing_mm'] = [1.0, 1.0, 1.0]",
    "masks that know no voxel size": "mask_header['has_known_spacing'] = False",
    "a voxel size known to the masks alone": "header['qc_flags'] = ['unknown_spacing']",
    "a voxel size known as a number": "mask_header['has_known_spacing'] = 1",
    "masks of a huge volume": (
        "mask_header['shape'] = mask_header['source_shape'] = [12, 1 << 20, 1 << 20]"
    ),
    "masks that inflate without end": "bits = bytes(64 << 20)",
    "masks that stop early": "bits = bits[:-1]",
    "masks of no affine": "mask_header['source_affine'] = [1, 2]",
    "masks of an endless affine": "mask_header['source_affine'][0][0] = float('inf')",
    "masks of nested lists": "mask_header = ['x'] * 3",
    "an unknown reason": REFUSAL.format("'DOE^JOHN'"),
    "a reason that is a list": REFUSAL.format("['not_ct']"),
    "no JSON": "reply = b'what\\n'",
    "nested without end": "reply = b'[' * 60000 + b'\\n'",
    "a list": "reply = b'[]\\n'",
    "no end of the line": "reply = b'x' * 100_000",
}


@pytest.mark.parametrize("name", LIES)
def test_impossible_answer_is_decode_crash(
    name: str, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    liar(monkeypatch, LIES[name])
    with pytest.raises(StudyError, match="decoder") as error:
        sandbox("dicom", [[b"x"]])
    assert error.value.reason == "decode_crash"
    assert "DOE" not in str(error.value)
    assert sandbox.child._process is None  # it was replaced


def test_refusal_message_of_the_child_is_cut_to_one_line(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    text = "'message': 'a\\n\\x1b[31m\\ud800' + 'x' * 1000"
    liar(monkeypatch, f"header = {{'nonce': request['nonce'], 'reason': 'not_ct', {text}}}")
    with pytest.raises(StudyError, match=r"a  .31m x{100}") as error:
        sandbox("dicom", [[b"x"]])
    assert error.value.reason == "not_ct"
    assert len(str(error.value)) == 300
    assert str(error.value).isprintable()


def test_internal_error_of_the_child_is_cut_to_one_line(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    liar(
        monkeypatch,
        "header = {'nonce': request['nonce'], 'internal': {'a': 'x' * 1000}, 'is_last': True}",
    )
    with pytest.raises(DecoderError, match=r"x{100}") as error:
        sandbox("dicom", [[b"x"]])
    assert len(str(error.value)) == 200


def test_impossible_identities_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for lie, expected in (
        ("pass", SeriesIdentity("1.2", "1.2.3")),
        ("row = None", None),
        ("row = [None, '1.2.3']", SeriesIdentity(None, "1.2.3")),
        ("row = ['1.2', None]", None),
        ("row = ['1.2', 'DOE^JOHN']", None),
        ("row = ['1.2', '1.2.3', '4']", None),
        ("row = '12'", None),
        ("header['num_bytes'] = 1 << 40", None),
        ("header['nonce'] = ''", None),
        ("header = {'nonce': request['nonce'], 'reason': 'too_large'}", None),
    ):
        liar(monkeypatch, lie)
        child = Child(HEADER_READER, LIMITS)
        assert headers.read_identities(child, [b"x"], 16) == [expected], lie
        child.kill()


def test_stored_masks_inflate_at_most_to_their_shape() -> None:
    header = {
        "shape": [2, 8, 8],
        "is_partial": False,
        "source_shape": [8, 8, 2],
        "spacing_mm": [1.0, 1.0, 1.0],
        "source_affine": np.eye(4).tolist(),
        "has_known_spacing": True,
    }
    line = json.dumps(header).encode() + b"\n"
    assert StoredMasks.unpack(line + zlib.compress(bytes(32))).lungs.lung_mask.shape == (2, 8, 8)
    with pytest.raises(ValueError, match="inflate to more than 32 bytes"):
        StoredMasks.unpack(line + zlib.compress(bytes(64 << 20)))
    with pytest.raises(ValueError, match="inflate to 31 bytes, expected 32"):
        StoredMasks.unpack(line + zlib.compress(bytes(31)))
    with pytest.raises(ValueError, match="not compressed"):
        StoredMasks.unpack(line + b"nothing")


@pytest.mark.parametrize("name", ["is_partial", "has_known_spacing"])
@pytest.mark.parametrize("value", [None, 1, "true"])
def test_masks_without_a_true_or_false_flag_are_refused(name: str, value: object) -> None:
    header = {
        "shape": [2, 8, 8],
        "is_partial": False,
        "source_shape": [8, 8, 2],
        "spacing_mm": [1.0, 1.0, 1.0],
        "source_affine": np.eye(4).tolist(),
        "has_known_spacing": True,
        name: value,
    }
    with pytest.raises(ValueError, match=f"{name} of the masks' header"):
        StoredMasks.unpack(json.dumps(header).encode() + b"\n" + zlib.compress(bytes(32)))

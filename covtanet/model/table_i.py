"""Switches of Table I: the parts of TA-SegNet that each row of the ablation has. Without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Parts of TA-SegNet that a row of Table I switches on."""

    encoder_tau: bool = False
    """Attention units behind the encoder's levels."""
    decoder_tau: bool = False
    """Attention units behind the decoder's levels."""
    encoder_in_fusion: bool = False
    """The encoder's levels enter the fusion."""
    decoder_in_fusion: bool = False
    """The decoder's levels enter the fusion."""


FULL = Switches(encoder_tau=True, decoder_tau=True, encoder_in_fusion=True, decoder_in_fusion=True)
SWITCHES = {
    "V1": Switches(),
    "V2": Switches(decoder_in_fusion=True),
    # Choice: the printed row of V3 repeats V4's ticks; the text calls V3 the fusion of encoder and
    # decoder.
    "V3": Switches(encoder_in_fusion=True, decoder_in_fusion=True),
    "V4": Switches(encoder_tau=True),
    "V5": Switches(decoder_tau=True),
    "V6": Switches(encoder_tau=True, decoder_tau=True),
    "V7": FULL,
    "V8": FULL,
}
# The row whose encoder is a pretrained EfficientNet.
PRETRAINED_ROW = "V8"

"""What a model needs to screen, from its description alone, without torch."""

from covtanet.ct.window import WindowConfig
from covtanet.errors import CheckpointError
from covtanet.model.description import Capabilities, Preprocessing


def check_capabilities(capabilities: Capabilities) -> None:
    """Refuse a model that cannot screen.

    Raises:
        CheckpointError: the model marks no lesions; an involvement of 0 would be invented.
    """
    if not capabilities.segments:
        raise CheckpointError(
            "the model marks no lesions, and a ledger without involvement is no screening"
        )


def model_window(values: Preprocessing, in_channels: int) -> WindowConfig:
    """Return the step from HU to the network's input that a model was trained with.

    in_channels: channels of a slice that its network reads.

    Raises:
        CheckpointError: an empty window, an unsupported size, or another number of channels than
            the network reads.
    """
    try:
        window = WindowConfig(
            low_hu=values.low_hu,
            high_hu=values.high_hu,
            size_px=values.size_px,
            crops_to_lungs=values.crops_to_lungs,
            num_neighbours=values.num_neighbours,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"invalid window of the model: {type(error).__name__}") from error
    num_channels = 1 + 2 * window.num_neighbours
    if in_channels != num_channels:
        raise CheckpointError(
            f"the model reads {in_channels} channels, expected {num_channels} of "
            f"{window.num_neighbours} neighbours on either side"
        )
    return window

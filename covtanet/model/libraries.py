"""Networks of timm, which is imported when such a network is built and nowhere else."""

import logging
from typing import Any

import torch

from covtanet.errors import ConfigError


def timm() -> Any:
    """Return the library timm, which imports torchvision.

    A torchvision that was built for CUDA does not load on a CPU torch, which lacks the schemas of
    two operators (pytorch/vision#9085); they are declared, and the import is tried again. Only
    detection would need the operators.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ConfigError(HOW_TO_INSTALL) from error
    except RuntimeError:
        _declare_operators()
        import torchvision  # noqa: F401
    try:
        import timm as library
    except ModuleNotFoundError as error:
        raise ConfigError(HOW_TO_INSTALL) from error
    # It warns of every head that a backbone leaves out.
    logging.getLogger("timm").setLevel(logging.ERROR)
    return library


HOW_TO_INSTALL = "this network needs timm: pip install 'covtanet[networks]'"
# A library's operators exist as long as it is referenced.
_DECLARED: list[Any] = []


def _declare_operators() -> None:
    if _DECLARED:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    _DECLARED.append(library)


def feature_extractor(name: str, in_channels: int, levels: tuple[int, ...] | None = None) -> Any:
    """Return a backbone of timm that gives its levels' maps, with random weights."""
    options = {} if levels is None else {"out_indices": levels}
    return timm().create_model(
        name, features_only=True, in_chans=in_channels, pretrained=False, **options
    )


def grey_statistics(name: str) -> dict[str, float]:
    """Return mean and standard deviation that published weights expect of values in [0, 1]."""
    published = timm().get_pretrained_cfg(name)
    return {
        "mean": sum(published.mean) / len(published.mean),
        "deviation": sum(published.std) / len(published.std),
    }

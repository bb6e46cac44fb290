"""The heavy libraries that some networks come from, imported where such a network is built and nowhere else."""

import logging
from typing import Any

import torch

from covtanet.errors import ConfigError


def timm() -> Any:
    """The library timm, which imports torchvision.

    A torchvision that was built for CUDA does not load on a CPU torch for the lack of two operators' schemas
    (pytorch/vision#9085); they are declared, and the import is tried again. Only detection would need the operators.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ConfigError(HOW_TO_INSTALL) from error
    except RuntimeError:
        if not _DECLARED:
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(schema)  # type: ignore[no-untyped-call]
            _DECLARED.append(library)
        import torchvision  # noqa: F401
    try:
        import timm as found
    except ModuleNotFoundError as error:
        raise ConfigError(HOW_TO_INSTALL) from error
    logging.getLogger("timm").setLevel(
        logging.ERROR
    )  # it warns of every head that a backbone leaves out
    return found


HOW_TO_INSTALL = "this network needs timm: pip install 'covtanet[networks]'"
_DECLARED: list[Any] = []  # a library lives as long as it is referenced


def feature_extractor(name: str, in_channels: int, levels: tuple[int, ...] | None = None) -> Any:
    """A backbone of timm that returns its levels' maps, with random weights."""
    chosen = {} if levels is None else {"out_indices": levels}
    return timm().create_model(
        name, features_only=True, in_chans=in_channels, pretrained=False, **chosen
    )


def grey_statistics(name: str) -> dict[str, float]:
    """Mean and standard deviation that a backbone's published weights expect of grey values in [0, 1]."""
    wanted = timm().get_pretrained_cfg(name)
    return {
        "mean": sum(wanted.mean) / len(wanted.mean),
        "deviation": sum(wanted.std) / len(wanted.std),
    }


def pooled_extractor(name: str, in_channels: int) -> tuple[Any, int]:
    """A classifier of timm that returns its pooled vector, with random weights; and the vector's length."""
    found = timm().create_model(name, in_chans=in_channels, num_classes=0, pretrained=False)
    return found, int(getattr(found, "head_hidden_size", None) or found.num_features)

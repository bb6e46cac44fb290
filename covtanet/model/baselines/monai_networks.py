"""V-Net (Milletari 2016) and Attention U-Net (Oktay 2018) by MONAI, in 2D.

MONAI is imported when a network is built: its import takes seconds.
"""

from torch import nn


def vnet(in_channels: int) -> nn.Module:
    """Return MONAI's VNet for slices."""
    from monai.networks.nets import VNet

    network: nn.Module = VNet(spatial_dims=2, in_channels=in_channels, out_channels=1)
    # MONAI's dropout is for volumes: on slices it would drop all features of a sample at once.
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout3d):
                setattr(module, name, nn.Dropout2d(child.p))
    return network


def attention_unet(in_channels: int, widths: tuple[int, ...]) -> nn.Module:
    """Return MONAI's AttentionUnet for slices."""
    from monai.networks.nets import AttentionUnet

    strides = (2,) * (len(widths) - 1)
    network: nn.Module = AttentionUnet(2, in_channels, 1, widths, strides)
    return network

"""The operators, one folder each; importing this package defines and registers them all."""

from . import backends as backends
from .bn_act import op as bn_act
from .bn_act_conv import op as bn_act_conv
from .conv2d import op as conv2d
from .conv_bias_act import op as conv_bias_act
from .conv_bn_act import op as conv_bn_act
from .conv_transpose2d import op as conv_transpose2d
from .running_stats import op as running_stats
from .upsample import op as upsample
from .upsample_concat import op as upsample_concat

__all__ = [
    "bn_act",
    "bn_act_conv",
    "conv2d",
    "conv_bias_act",
    "conv_bn_act",
    "conv_transpose2d",
    "running_stats",
    "upsample",
    "upsample_concat",
]

"""conv_bn_act around cuDNN's convolution: the selected bn_act normalises what it returns."""

from __future__ import annotations

from ..backends import computed_by
from ..bn_act.op import BN_ACT
from ..conv2d import cudnn
from .composed import composed

forward = composed(cudnn.forward, computed_by("", BN_ACT), in_place=False)

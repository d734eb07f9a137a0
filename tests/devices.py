"""Where the Triton kernels are tested: on the GPU, and without one in Triton's interpreter."""

import pytest
import torch

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these kernels")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def on(device, *tensors):
    """The tensors on a device."""
    return tuple(tensor.to(device) for tensor in tensors)


def back(result):
    """A result, or a tuple of them, on the CPU."""
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def in_layout(scale, layout):
    """Whether a scale lies in memory as asked for."""
    rows = scale[..., 0].numel()
    if layout == "row":
        return scale.is_contiguous()
    strides = scale.stride()
    return strides[-1] == -(-rows // 4) * 4 and (scale.dim() == 1 or strides[-2] == 1)

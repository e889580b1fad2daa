"""What the tests of the quantizing kernels share: devices, grids, and the codes that an error of float32 leaves open.

The reference always runs on the CPU: PyTorch's CUDA division by a Python number multiplies by its reciprocal.
"""

import torch
from lit_actreg_kernels.grid import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def static_grid(scale, zero_point):
    return torch.tensor([scale]), torch.tensor([zero_point])


def upward(weight, group_size):
    """The weight [N, K] with the largest value of each group made positive.

    A symmetric min-max grid has its lowest value exactly between two codes, where the last bit of the scale decides;
    its highest takes the highest code either way.
    """
    groups = weight.unflatten(1, (-1, group_size))
    at = groups.abs().argmax(-1, keepdim=True)
    return groups.scatter(-1, at, groups.gather(-1, at).abs()).flatten(1)


def assert_codes_between(codes, lowest, highest, grid, bits):
    """Codes of values known to lie from ``lowest`` to ``highest``: quantizing is monotone.

    Bounds so wide that they leave a choice of codes for more than one value in a hundred would test nothing.
    """
    first, last = (quantize(y.float(), *grid, bits) for y in (lowest, highest))
    assert (first == last).float().mean() >= 0.99
    assert ((first <= codes.cpu()) & (codes.cpu() <= last)).all()

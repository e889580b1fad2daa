"""What the tests of the quantizing kernels share: devices, grids, and equality up to a code at a rounding edge.

The reference always runs on the CPU: PyTorch's CUDA division by a Python number multiplies by its reciprocal.
"""

import torch

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


def assert_codes_match(codes, expected, before_rounding, tolerance):
    """Equal, except by one code where the value before rounding is within ``tolerance`` steps of an edge."""
    difference = (codes.cpu().int() - expected.int()).abs()
    edge = (before_rounding - before_rounding.floor() - 0.5).abs() <= tolerance
    assert difference.max() <= 1
    assert not (difference.bool() & ~edge).any()

"""One token on a linear with groups against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from lit_actreg_kernels import int4_grouped_gemv
from lit_actreg_kernels.int4_gemv import GemvTile
from test_int4_linear import DEVICE, expected, problem


@pytest.mark.parametrize("per_group", [False, True], ids=["static", "groups of the token"])
@pytest.mark.parametrize(("n", "k", "groups", "padding"), [(5, 96, 3, 32), (33, 384, 6, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_with_groups(n, k, groups, padding, per_group, dtype):
    tensors, _ = problem(1, n, k, groups, padding=padding)
    if per_group:
        tensors["act_scale"] = torch.rand(1, groups) + 0.1
        tensors["act_zero_point"] = torch.randint(-8, 8, (1, groups)).float()
    assert int4_grouped_gemv.serves(tensors["x"], tensors["packed"], groups)
    wide = expected(tensors, torch.float32)
    rtol = 32 * torch.finfo(torch.float32).eps
    tolerance = rtol * wide.abs().max() + torch.finfo(dtype).eps * wide.abs()
    for block_n in (4, 16):
        tile = GemvTile(block_n, 4)
        y = torch.empty(1, n, dtype=dtype, device=DEVICE)
        on_device = {name: value.to(DEVICE) for name, value in tensors.items()}
        int4_grouped_gemv.int4_grouped_gemv(on_device.pop("x"), **on_device, y=y, tile=tile)
        assert ((y.cpu().double() - wide).abs() <= tolerance).all()

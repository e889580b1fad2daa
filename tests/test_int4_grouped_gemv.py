"""One token on a linear with groups against plain PyTorch: in the interpreter without a GPU, compiled with one."""

import pytest
import torch
from lit_actreg_kernels import int4_grouped_gemv
from lit_actreg_kernels.int4_gemv import GemvTile
from test_int4_grouped import grouped_problem
from test_int4_linear import DEVICE


@pytest.mark.parametrize(
    ("n", "k", "padding", "act_groups", "weight_groups"),
    [
        (5, 96, 32, 1, 3),
        (33, 384, 0, 1, 6),
        (5, 96, 32, 3, 1),
        (33, 384, 0, 6, 1),
        (33, 384, 0, 6, 3),
        (33, 384, 0, 3, 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_with_groups(n, k, padding, act_groups, weight_groups, dtype):
    tensors, wide = grouped_problem(1, n, k, padding, act_groups, weight_groups)
    assert int4_grouped_gemv.serves(tensors["codes"], tensors["packed"], max(act_groups, weight_groups))
    rtol = 32 * torch.finfo(torch.float32).eps
    tolerance = rtol * wide.abs().max() + torch.finfo(dtype).eps * wide.abs()
    for block_n in (4, 16):
        tile = GemvTile(block_n, 4)
        y = torch.empty(1, n, dtype=dtype, device=DEVICE)
        on_device = {name: None if value is None else value.to(DEVICE) for name, value in tensors.items()}
        int4_grouped_gemv.int4_grouped_gemv(**on_device, y=y, tile=tile)
        assert ((y.cpu().double() - wide).abs() <= tolerance).all()

"""The training operators as PyTorch sees them: operator checks, float64 gradients, errors."""

import importlib

import pytest
import torch
from fake_quant_checks import clips, doubled, formula
from lit_actreg_kernels import training_ops, view_ops
from lit_actreg_kernels.linear_cross_entropy import linear_cross_entropy
from quantizer_checks import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from lit_actreg.quant.statistics import token_kurtosis

OPTIONS = (4, True, True)
TYPES = (torch.float32, torch.bfloat16)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def samples(looks=training_ops.NOWHERE):
    low, high = (clip.requires_grad_() for clip in clips())
    norm = (leaf(3, 32), leaf(32), leaf(32), low, high, 1e-5, False, *OPTIONS, *TYPES, *looks)
    rms = (leaf(3, 32), leaf(32), None, low, high, 1e-5, True, *OPTIONS, *TYPES, *looks)
    return {
        "fake_quantize": (training_ops.fake_quantize, (leaf(3, 32), low, high, *OPTIONS)),
        "gelu": (training_ops._activation_fake_quantize, (leaf(3, 32), leaf(32), low, high, False, *OPTIONS, *looks)),
        "swiglu": (training_ops._activation_fake_quantize, (leaf(3, 32), None, low, high, True, *OPTIONS, *looks)),
        "swiglu alone": (training_ops.swiglu, (leaf(3, 32),)),
        "swiglu on tokens' grids": (training_ops._swiglu_fake_quantize_per_token, (leaf(3, 32), 4, 2, *looks)),
        "rotate": (view_ops._Rotate.apply, (leaf(4, 3, 32), *torch.randn(2, 3, 8, device=DEVICE), 2, 1, *looks)),
        "norm": (training_ops._add_norm_fake_quantize, (leaf(3, 32), *norm)),
        "RMS norm": (training_ops._add_norm_fake_quantize, (leaf(3, 32), *rms)),
    }


@pytest.mark.parametrize("name", sorted(samples().keys() - {"rotate"}))  # no operator, but around two
def test_opcheck(name):
    operator, arguments = samples()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", ["gelu", "swiglu", "swiglu on tokens' grids", "norm", "RMS norm"])
def test_opcheck_with_kurtosis(name):
    operator, arguments = samples((1, 2, 1e-12))[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", list(samples()))
def test_inputs_need_not_be_contiguous(monkeypatch, name):
    """The kernels' must be: operators copy for them. Without a GPU they run in the interpreter."""
    modules = training_ops.__name__.rpartition(".")[0]
    monkeypatch.setattr(training_ops, "implementation", lambda _, name: importlib.import_module(f"{modules}.{name}"))
    operator, arguments = samples()[name]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]

    def values_and_gradients(strided):
        found = operator(*(strided(a) if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in arguments))
        outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad and y.numel()]
        torch.manual_seed(0)
        gradients = [strided(torch.randn(y.shape, device=DEVICE)) for y in outputs]
        return outputs, torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    expected = values_and_gradients(torch.Tensor.contiguous)
    # SwiGLU's value is PyTorch's own, vectorized or not: either has 2 roundings (eps / 2) of exp and 3 after it.
    rtol = 5 * torch.finfo(torch.float32).eps if name == "swiglu alone" else 0
    torch.testing.assert_close(values_and_gradients(lambda a: a.mT.contiguous().mT), expected, rtol=rtol, atol=0)


def test_a_norm_behind_another_in_float64():
    """x′ goes on to the next one, and its whole gradient comes out of the first one's backward."""
    torch.manual_seed(0)
    x, y, weight, bias = (torch.randn(s, dtype=torch.float64) for s in [(4, 6, 16), (4, 6, 16), (16,), (16,)])
    target = torch.randn(4, 6, 16, dtype=torch.float64)
    low, high = clips(torch.float64, "cpu")

    def plain_norm(x, y, weight, bias, low, high):
        x_hat = formula(functional.layer_norm(x + y, (16,), weight, bias), low, high, *OPTIONS)
        return x + y, x_hat, token_kurtosis(y[:, 1::2])

    def fused_norm(x, y, *rest):
        rest = (*rest, 1e-5, False, *OPTIONS, torch.float64, torch.float64)
        return training_ops.add_norm_fake_quantize(x, y, *rest, looks=(1, 2, 1e-12))

    results = []
    for norm in (plain_norm, fused_norm):
        leaves = doubled(x, y, weight, bias, low, high)
        new, first_hat, first_kappa = norm(*leaves)
        new, second_hat, second_kappa = norm(new, leaves[1] * first_hat, *leaves[2:])
        (((second_hat + new) * target).sum() + 3 * first_kappa + 5 * second_kappa).backward()
        results.append((second_hat.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_activations_in_float64(gated):
    torch.manual_seed(0)
    h, low, high = doubled(torch.randn(7, 12) * 2, *clips(torch.float64, "cpu"))
    y = functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if gated else functional.gelu(h)
    expected = torch.autograd.grad(formula(y, low, high, *OPTIONS).square().sum(), (h, low, high))
    function = training_ops.swiglu_fake_quantize if gated else training_ops.gelu_fake_quantize
    found = torch.autograd.grad(function(h, low, high, *OPTIONS)[0].square().sum(), (h, low, high))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gelus_operator_sums_the_gradient_of_a_bias_that_was_detached():
    torch.manual_seed(0)
    x, bias, low, high = doubled(torch.randn(2, 7, 12) * 2, torch.randn(12), *clips(torch.float64, "cpu"))
    y = formula(functional.gelu(x + bias), low, high, *OPTIONS)
    expected = torch.autograd.grad(y.square().sum(), (x, bias))
    y, _ = training_ops.gelu_fake_quantize(x + bias.detach(), low, high, *OPTIONS, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, bias)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gelu", "swiglu", "swiglu on tokens' grids", "norm", "rotate"])
@pytest.mark.parametrize(
    ("shape", "first", "step"), [((2, 9, 12), 2, 4), ((3, 8), 0, 1), ((2, 3, 5, 68), 1, 2), ((1, 3, 5200), 1, 2)]
)
@pytest.mark.parametrize("interpreted", [False, True])
def test_kurtosis_comes_along(monkeypatch, name, shape, first, step, interpreted):
    """Its value, and its gradient on top of the operator's own, by the reference and by the kernels."""
    if interpreted:
        modules = training_ops.__name__.rpartition(".")[0]
        monkeypatch.setattr(training_ops, "implementation", lambda _, n: importlib.import_module(f"{modules}.{n}"))
    operator, (_, *rest) = samples((first, step, 1e-12))[name]
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 2, shape[-1])  # the tiles of a row have other means than the row
    h = (torch.randn(shape, generator=generator) * 2 + ramp).to(DEVICE).requires_grad_()
    if name == "norm":
        grid = (*clips(), 1e-5, False, *OPTIONS, torch.float32, torch.float32)
        whole, rest = operator, (leaf(shape[-1]), leaf(shape[-1]), *grid, first, step, 1e-12)

        def operator(y, *rest):
            _, x_hat, _, kappa, terms, _ = whole(torch.ones_like(y), y, *rest)
            return x_hat, kappa, terms

    elif name == "gelu":
        rest[0] = leaf(shape[-1])  # bias
    elif name == "swiglu on tokens' grids" and shape[-1] == 5200:
        rest[1] = 26  # groups: the last tile has two of eight
    elif name == "rotate":
        width, num_groups = {12: (2, 1), 8: (2, 1), 68: (4, 3), 5200: (40, 33)}[shape[-1]]
        num_heads = shape[-1] // width - 2 * num_groups
        rest = (*torch.randn(2, shape[-2], width, device=DEVICE), num_heads, num_groups, first, step, 1e-12)

        def operator(qkv, *rest):
            q, k, v, kappa = view_ops._Rotate.apply(qkv, *rest)
            return torch.cat([q, k, v], dim=-2), kappa, None

    plain = [*rest[:-3], *training_ops.NOWHERE]
    g = torch.randn(operator(h, *rest)[0].shape, generator=generator).to(DEVICE)
    x_hat, kappa, _ = operator(h, *rest)
    assert torch.equal(x_hat, operator(h, *plain)[0])
    wide = h.detach().double().cpu().requires_grad_()
    expected = token_kurtosis(wide[..., first::step, :])
    expected.backward()
    torch.testing.assert_close(kappa.cpu().double(), expected.detach(), rtol=1e-5, atol=0)
    alone = torch.autograd.grad(operator(h, *plain)[0], h, g)[0]
    leaves = (h, rest[0]) if name == "gelu" else (h,)
    found, *bias = torch.autograd.grad((x_hat, kappa), leaves, (g, torch.tensor(30.0, device=DEVICE)))
    torch.testing.assert_close((found - alone).cpu().double(), 30 * wide.grad, rtol=1e-4, atol=2e-5)
    for gradient in bias:
        torch.testing.assert_close(gradient, found.flatten(0, -2).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gelu", "swiglu", "swiglu on tokens' grids", "norm", "rotate", "linear_cross_entropy"]
)
def test_batches_of_any_size_share_two_compilations(name):
    """One for the first size, one for all: a block that is compiled whole would give up after eight."""
    low, high = clips()
    weight, norm_weight = torch.randn(50, 24, device=DEVICE), torch.ones(24, device=DEVICE)
    angles = torch.randn(2, 6, 6, device=DEVICE)

    def loss(x: torch.Tensor) -> torch.Tensor:
        if name == "linear_cross_entropy":
            targets = torch.zeros_like(x[..., 0], dtype=torch.int64).flatten()
            return linear_cross_entropy(x.flatten(0, 1), weight, targets, -100)
        if name == "norm":
            rest = (norm_weight, None, low, high, 1e-5, True, *OPTIONS, *TYPES)
            new, x_hat, kappa = training_ops.add_norm_fake_quantize(x, x.sin(), *rest, looks=(1, 2, 1e-12))
            return new.sum() + x_hat.sum() + kappa
        if name == "rotate":
            q, k, v, kappa = view_ops.rotate(x, *angles, 2, 1, (1, 2, 1e-12))
            return q.sin().sum() + k.sum() + v.sin().sum() + kappa
        if name == "swiglu on tokens' grids":
            x_hat, kappa = training_ops.swiglu_fake_quantize_per_token(x, 4, 2, (1, 2, 1e-12))
        else:
            function = training_ops.swiglu_fake_quantize if name == "swiglu" else training_ops.gelu_fake_quantize
            x_hat, kappa = function(x, low, high, *OPTIONS, looks=(1, 2, 1e-12))
        return x_hat.sum() + kappa

    torch._dynamo.reset()  # what other runs of this test have compiled
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for num_sequences in (2, 200, 3, 5, 11):
        compiled(torch.randn(num_sequences, 6, 24, device=DEVICE, requires_grad=True)).backward()
    assert counter.frame_count <= 2


def test_mistakes_are_named():
    low, high = clips()
    x = torch.zeros(2, 4, device=DEVICE)
    weight = torch.ones(4, device=DEVICE)
    rest = (low, high, 1e-5, True, *OPTIONS, *TYPES)
    with pytest.raises(ValueError, match="activation bits 9"):
        training_ops.fake_quantize(x, low, high, 9, True, True)
    with pytest.raises(ValueError, match="one clip of shape"):
        training_ops.fake_quantize(x, low.expand(4), high, *OPTIONS)
    with pytest.raises(ValueError, match="cast it to float32"):
        training_ops.fake_quantize(x.int(), low, high, *OPTIONS)
    with pytest.raises(ValueError, match="an even number"):
        training_ops.swiglu_fake_quantize(x[:, :3], low, high, *OPTIONS)
    with pytest.raises(ValueError, match="does not fit h"):
        training_ops.gelu_fake_quantize(x, low, high, *OPTIONS, bias=weight[:3])
    with pytest.raises(ValueError, match="has no bias"):
        training_ops.add_norm_fake_quantize(x, x, weight, weight, *rest)
    with pytest.raises(ValueError, match="must have shape"):
        training_ops.add_norm_fake_quantize(x, x, weight[:3], None, *rest)
    with pytest.raises(ValueError, match="cannot be added"):
        training_ops.add_norm_fake_quantize(x.bfloat16(), x, weight, None, *rest)

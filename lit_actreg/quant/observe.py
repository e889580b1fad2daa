"""Looks at what passes the quantized sites, without touching the compiled graph.

Forward hooks added to a compiled block do not fire, and keeping them in would recompile it. So the model is run eagerly
(``torch.compiler.set_stance``), without gradients, with hooks that live for that one pass; the compiled code stays as
it was. Under FSDP every rank must take part, as in any forward pass.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lit_actreg.config import SITES, Site

Observer = Callable[[int, Site, nn.Module, Tensor], None]


@torch.no_grad()
def observe_inputs(model: nn.Module, ids: Tensor, observer: Observer) -> None:
    """Runs ids [B, T] through a decoder; ``observer(layer, site, linear, x)`` sees every linear's raw input.

    The linear is what stands at the site: a training linear, or one that quantization or a kernel swap put there.
    """
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]
            for site in SITES:

                def hook(linear: nn.Module, args: tuple[Tensor], layer: int = layer, site: Site = site) -> None:
                    observer(layer, site, linear, args[0])

                stack.enter_context(getattr(block, site).register_forward_pre_hook(hook))
        model.eval()
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model(ids)

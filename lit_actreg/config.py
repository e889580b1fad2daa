"""Every hyper-parameter of the model, its input quantization and its optimizer: plain dataclasses.

They are the YAML's vocabulary (LightningCLI shows their docstrings as help) and travel in checkpoints as plain dicts.
A user's mistake raises ``ValueError`` with one line that names the field, the reason and the mend.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Site = Literal["qkv", "attn_proj", "mlp_in", "mlp_proj"]
SITES: tuple[Site, ...] = ("qkv", "attn_proj", "mlp_in", "mlp_proj")


@dataclass
class ModelConfig:
    """Shape of the decoder.

    Attributes:
        style: Block style. "neox": LayerNorm, biases and GELU (the paper's; exports as GPT-NeoX); "llama": RMSNorm
            and SwiGLU (exports as Llama).
        num_layers: Number of blocks.
        width: Width of the residual stream.
        num_heads: Attention heads; divides the width, and width / num_heads is even (rotary positions).
        num_kv_heads: Key/value heads (grouped-query attention, "llama" only); null means num_heads.
        mlp_width: Hidden width of the MLP; null means 4 × width for "neox", 8/3 × width rounded up to 64 for "llama".
        context: Longest sequence, in tokens.
        rope_theta: Base of the rotary frequencies.
        norm_eps: ε of the norms.
        tie_embeddings: Share the embedding matrix with the LM head.
        init_std: Standard deviation of the initial weights; the two projections into the residual stream get
            init_std / √(2 · num_layers).
    """

    style: Literal["neox", "llama"] = "neox"
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_width: int | None = None
    context: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is too small: use 1 or more")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is too small: use more than 0")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} does not split into {self.num_heads} heads of even width: change one")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}: change one"
            )
        if self.style == "neox" and self.kv_heads != self.num_heads:
            raise ValueError('num_kv_heads needs style "llama": GPT-NeoX has no grouped-query attention')

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_width(self) -> int:
        default = 4 * self.width if self.style == "neox" else -(-8 * self.width // 3 // 64) * 64
        return self.mlp_width or default


@dataclass
class QuantConfig:
    """How the inputs of the linears inside blocks are quantized while training and validating.

    Attributes:
        activations: "none": inputs stay as they are; "static": learned clips, one pair a linear (the method);
            "clamp": inputs are clamped to the clips but not rounded (the paper's activation clamping); "token":
            dynamic asymmetric min-max per token (the paper's RTN; for models trained without clips). Rivals, for
            comparison: "rotated": per token after a Hadamard rotation; "quest": the same with QuEST's estimator.
        activation_bits: Bits of the grid, 2-8.
        zero_point: "integer" (zero is exact; kernels and formats can hold it) or "real" (as published).
        sites: Linear inputs that are quantized.
        per_token_sites: Those of ``sites`` that have no clips where others have: their grids follow each token
            ("static"), and nothing is clamped ("clamp").
        token_group_size: Neighbouring columns of a token that share a min-max grid, at sites whose grids follow tokens;
            null: all of them. Groups are what SwiGLU's product needs: its tails are long in every token.
        outside_gradient: Gradient of an input outside its clips: "masked" (none, as published) or "passed".
    """

    activations: Literal["none", "static", "clamp", "token", "rotated", "quest"] = "static"
    activation_bits: int = 4
    zero_point: Literal["integer", "real"] = "integer"
    sites: list[Site] = field(default_factory=lambda: list(SITES))
    per_token_sites: list[Site] = field(default_factory=list)
    token_group_size: int | None = None
    outside_gradient: Literal["masked", "passed"] = "masked"

    def __post_init__(self) -> None:
        if not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits {self.activation_bits} is out of range: choose 2 to 8")
        unknown = sorted(set(self.sites + self.per_token_sites) - set(SITES))
        if unknown:
            raise ValueError(f"unknown sites {unknown}: choose from {list(SITES)}")
        unquantized = sorted(set(self.per_token_sites) - set(self.sites))
        if unquantized:
            raise ValueError(f"per_token_sites {unquantized} are not quantized: name them in sites too")
        if self.token_group_size is not None and self.token_group_size < 1:
            raise ValueError(
                f"token_group_size {self.token_group_size} is no number of columns: choose 1 or more, or null"
            )

    def mode(self, site: Site) -> str:
        """How one site's input is quantized: as ``activations`` says, "token" or "none"."""
        if site not in self.sites:
            return "none"
        if site in self.per_token_sites:
            return {"static": "token", "clamp": "none"}.get(self.activations, self.activations)
        return self.activations

    @property
    def clipped_sites(self) -> list[Site]:
        """Sites whose inputs have clips."""
        return [site for site in SITES if self.mode(site) in ("static", "clamp")]


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule: linear warm-up, then cosine down to a share of the peak.

    Attributes:
        lr: Peak learning rate.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Optimizer step at which the cosine ends; null means the trainer's max_steps.
        min_lr_ratio: Learning rate at the end, as a share of the peak.
        weight_decay: Decoupled decay of matrices; norms, biases and clips have none.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: ε of the denominator.
    """

    lr: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("lr", "warmup_steps", "weight_decay", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} {getattr(self, name)} is negative: use 0 or more")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optim.decay_steps {self.decay_steps} is too small: use 1 or more, or null")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio {self.min_lr_ratio} is out of range: choose 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} {getattr(self, name)} is out of range: choose 0 to below 1")


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass as plain values, for checkpoints, which must load with ``weights_only``."""
    return asdict(config)

"""Quantizes the model when a fit ends, with the same function as ``lit-actreg quantize``.

On the command line:

    lit-actreg fit --config … --trainer.callbacks+=PostFitQuantization --trainer.callbacks.quantizer=GPTQ \\
        --trainer.callbacks.output=artifacts/gptq

The fit's last weights are quantized, on rank zero alone. A sharded model (FSDP2) is refused before the first step,
because no rank holds it whole: run ``lit-actreg quantize`` on its checkpoint.
"""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_actreg.artifact import check_output
from lit_actreg.contracts import Quantizer
from lit_actreg.data.datamodule import TextDataModule
from lit_actreg.model import Decoder
from lit_actreg.module import LitLanguageModel
from lit_actreg.plan import plan_layers, stored_quant_config
from lit_actreg.quantize import quantize_model


def text_of(trainer: Trainer) -> TextDataModule | None:
    """What the fit is trained on, if it is text of ours."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, TextDataModule) else None


class PostFitQuantization(Callback):
    """Writes a quantized checkpoint when the fit ends.

    Args:
        quantizer: What turns weights into codes.
        output: Folder of the artifact.
        calibration_tokens: Tokens of the training text that calibration sees.
        seed: Which ones.
        overwrite: Whether an artifact that is already there is replaced.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        output: Path = Path("artifacts/post_fit"),
        calibration_tokens: int = 131072,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.quantizer, self.output = quantizer, Path(output)
        self.calibration_tokens, self.seed, self.overwrite = calibration_tokens, seed, overwrite

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses before the fit what would fail after it."""
        if stage != "fit":
            return
        check_output(self.output, self.overwrite)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "PostFitQuantization cannot gather a sharded model: run `lit-actreg quantize` on its checkpoint instead"
            )
        if self.quantizer.needs_hessian and text_of(trainer) is None:
            raise ValueError(f"{type(self.quantizer).__name__} calibrates on text: fit with a TextDataModule")
        assert isinstance(pl_module, LitLanguageModel)
        quant, _ = stored_quant_config(pl_module.quant, round_zero_point=False, format="auto", calibrate=None)
        with torch.device("meta"):
            model = Decoder(pl_module.shape, pl_module.quant, pl_module.vocab_size)
        plan_layers(model, self.quantizer, quant)
        self.quantizer.options()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model, data = pl_module.model, text_of(trainer)
        assert isinstance(model, Decoder)
        with torch.no_grad():
            quantize_model(
                model,
                self.quantizer,
                data.calibration_batches(self.calibration_tokens, self.seed) if data else (),
                self.output,
                data.tokenizer_path if data else None,
                device=pl_module.device,
                overwrite=self.overwrite,
            )

"""The unfinished work of one quantization: a file a finished block, in a folder beside the output.

Every file is written beside its place and renamed, so that a block is there whole or not at all, whenever the process
was killed. The folder remembers the fingerprint of the job, and refuses any other.
"""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_actreg.artifact import writing
from lit_actreg.config import SITES, QuantConfig, Site
from lit_actreg.contracts import QuantizedWeight, Quantizer
from lit_actreg.model import Decoder


def described(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer's class, options, and a hash of the files of it and its bases: who mends one wants new codes.

    Of other files that they use nothing is known.
    """
    kind, code = type(quantizer), hashlib.sha256()
    for base in kind.__mro__[: kind.__mro__.index(Quantizer)]:
        with contextlib.suppress(OSError, TypeError):  # from a notebook, for one
            code.update(Path(inspect.getfile(base)).read_bytes())
    name = f"{kind.__module__}.{kind.__qualname__}"
    return {"class": name, "code": code.hexdigest(), "options": quantizer.options()}


def fingerprint(model: Decoder, quant: QuantConfig, settings: dict[str, Any], calibration: Sequence[Tensor]) -> str:
    """A hash of all that decides the codes: weights, settings, calibration tokens.

    Tensors are hashed on several threads: one takes 4 s for the 4 GB of 1 B parameters.
    """

    def hashed(name: str, tensor: Tensor) -> bytes:
        digest = hashlib.sha256(f"{name} {tuple(tensor.shape)}".encode())
        tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
        digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.digest()

    options = json.dumps([asdict(model.config), asdict(quant), settings], sort_keys=True)
    named = sorted(model.state_dict().items())
    named += [(f"batch {index}", ids) for index, ids in enumerate(calibration)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        parts = pool.map(lambda pair: hashed(*pair), named)
        return hashlib.sha256(options.encode() + b"".join(parts)).hexdigest()


class WorkFolder:
    """Finished blocks of one job: job.json with its fingerprint, block_<i>.safetensors with codes and report lines."""

    def __init__(self, path: Path, job: str, overwrite: bool) -> None:
        self.path = path
        if path.exists() and overwrite and self._job() != job:
            shutil.rmtree(path)
        if path.exists() and any(path.iterdir()) and self._job() != job:
            raise FileExistsError(
                f"{path} holds the unfinished work of another model or other options: repeat that command, delete the "
                "folder, or set overwrite"
            )
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / "job.json").write_text(json.dumps({"fingerprint": job}) + "\n")

    def _job(self) -> str | None:
        try:
            return json.loads((self.path / "job.json").read_text())["fingerprint"]
        except (OSError, ValueError, KeyError):
            return None

    def _file(self, index: int) -> Path:
        return self.path / f"block_{index:04d}.safetensors"

    def save(self, index: int, weights: dict[Site, QuantizedWeight], layers: list[dict[str, Any]]) -> None:
        tensors: dict[str, Tensor] = {}
        for site, weight in weights.items():
            tensors |= {f"{site}.codes": weight.codes, f"{site}.scale": weight.scale}
            if weight.zero_point is not None:
                tensors[f"{site}.zero_point"] = weight.zero_point
        partial = self._file(index).with_suffix(".partial")
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with writing(partial):
            save_file(stored, partial, {"layers": json.dumps(layers)})
            os.replace(partial, self._file(index))

    def load(self, index: int, bits: int) -> tuple[dict[Site, QuantizedWeight], list[dict[str, Any]]] | None:
        """The finished block, or None where it is not finished, or was torn when the machine stopped."""
        if not self._file(index).exists():
            return None
        try:
            with safe_open(self._file(index), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                layers = json.loads(file.metadata()["layers"])
        except SafetensorError:
            return None
        weights = {
            site: QuantizedWeight(
                tensors[f"{site}.codes"], tensors[f"{site}.scale"], tensors.get(f"{site}.zero_point"), bits
            )
            for site in SITES
        }
        return weights, layers

"""4-bit and 8-bit FFN weights (bitsandbytes): what is taken away is precision."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import nn

from caprese.efficient_methods.base import Method, Part, Reads
from caprese.errors import CapreseError
from caprese.kernels import PackedFFN
from caprese.models import FFN, Weights

_NO_ROWS = "packed 4-bit or 8-bit weights cannot be selected row by row"


def _bitsandbytes(method: str) -> Any:
    try:
        import bitsandbytes
    except Exception as error:  # a broken CUDA set-up raises more than ImportError
        raise CapreseError(f"{method} needs bitsandbytes: pip install 'caprese[quantized]' ({error})") from error
    # it warns at every product that int8 activations come from float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return bitsandbytes


class QuantizedFFN(nn.Module):
    """A copy of an FFN whose linear layers are bitsandbytes'; the same functions as `models.FFN`."""

    def __init__(self, ffn: FFN | PackedFFN, quantize: Any) -> None:
        super().__init__()
        w = ffn.weights()
        self.gated, self.fused = ffn.gated, False
        self.hidden_size, self.width = ffn.hidden_size, ffn.width
        self.act = ffn.act
        self.gate_proj = None if w.gate is None else quantize(w.gate, w.gate_bias)
        self.up_proj = quantize(w.up, w.up_bias)
        self.down_proj = quantize(w.down, w.down_bias)

    def neurons(self, x: torch.Tensor, x_up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.gate_proj is None:
            a = self.act(self.up_proj(x))
            return a, a
        a = self.act(self.gate_proj(x))
        return a, a * self.up_proj(x if x_up is None else x_up)

    def down(self, z: torch.Tensor) -> torch.Tensor:
        return self.down_proj(z)

    def weights(self) -> Weights:
        raise CapreseError(_NO_ROWS)


class _Quantized(Method):
    parts: ClassVar[frozenset[Part]] = frozenset({"weights"})
    packs: ClassVar[bool] = True
    bits: ClassVar[float]

    def check(self) -> None:
        _bitsandbytes(self.name)

    @property
    def reads_weights(self) -> bool:
        return True

    def quantize(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """A bitsandbytes layer holding weight [out, in]."""
        raise NotImplementedError

    def transform(self, ffn: FFN | PackedFFN, choice: torch.Tensor | None) -> Any:
        return QuantizedFFN(ffn, self.quantize).requires_grad_(False).to(ffn.device)

    def reads(self, reads: Reads) -> Reads:
        return reads.times(self.bits / 16)


class Nf4(_Quantized):
    """FFN weights as 4-bit NormalFloat in blocks of 64 (QLoRA, arXiv 2305.14314). The prompt still runs dense, so the
    dense weights stay in memory beside the packed ones."""

    name: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "FFN weights in 4-bit NormalFloat (bitsandbytes)"
    bits: ClassVar[float] = 4.5  # 4 and a float32 scale for 64 weights

    def quantize(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        bnb = _bitsandbytes(self.name)
        out, size = weight.shape
        layer = bnb.nn.Linear4bit(size, out, bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            weight.detach().contiguous().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layer.support_avx512bf16_for_cpu = False  # it repacks in place at the first pass without gradient
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer.to(weight.device)


class Int8(_Quantized):
    """FFN weights as 8-bit integers with a scale for each row (LLM.int8(), arXiv 2208.07339)."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "FFN weights in 8-bit integers (bitsandbytes)"
    bits: ClassVar[float] = 8.0

    def quantize(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        bnb = _bitsandbytes(self.name)
        out, size = weight.shape
        layer = bnb.nn.Linear8bitLt(size, out, bias is not None, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            weight.detach().contiguous().cpu().clone(), requires_grad=False, has_fp16_weights=False
        )
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer.to(weight.device)

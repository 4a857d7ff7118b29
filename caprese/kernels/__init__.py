"""Operations on chosen rows of an FFN: for each a plain torch reference, a Triton kernel, and the choice between."""

from caprese.kernels.activations import activation_name
from caprese.kernels.cats_select import cats_select
from caprese.kernels.dispatch import MAX_BATCH, Rows, triton_runs
from caprese.kernels.down import down
from caprese.kernels.gate_up import gate_up
from caprese.kernels.input_sparse import input_sparse
from caprese.kernels.packed import PackedFFN, sparse_down
from caprese.kernels.quantized import (
    GROUP,
    QuantizedRows,
    WholeFFN,
    few_tokens,
    products,
    quantize,
    runs_whole,
    sums,
    whole_ffn,
)
from caprese.kernels.quantized.ffn import QuantizedFFN
from caprese.kernels.quantized.layer import DecoderLayer, DecoderLayers, LayerWeights, Projection

__all__ = [
    "GROUP",
    "MAX_BATCH",
    "DecoderLayer",
    "DecoderLayers",
    "LayerWeights",
    "PackedFFN",
    "Projection",
    "QuantizedFFN",
    "QuantizedRows",
    "Rows",
    "WholeFFN",
    "activation_name",
    "cats_select",
    "down",
    "few_tokens",
    "gate_up",
    "input_sparse",
    "products",
    "quantize",
    "runs_whole",
    "sparse_down",
    "sums",
    "triton_runs",
    "whole_ffn",
]

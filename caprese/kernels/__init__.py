"""Sparse FFN kernels: a plain torch reference for each, Triton kernels, and the dispatch between them."""

from caprese.kernels.gather import activation_name, cats_select, down, gate_up, input_sparse, triton_runs
from caprese.kernels.sparse_ffn import PackedFFN, sparse_down

__all__ = [
    "PackedFFN",
    "activation_name",
    "cats_select",
    "down",
    "gate_up",
    "input_sparse",
    "sparse_down",
    "triton_runs",
]

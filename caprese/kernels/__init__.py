"""Sparse FFN kernels: a plain torch reference for each."""

from caprese.kernels.sparse_ffn import PackedFFN, sparse_down

__all__ = ["PackedFFN", "sparse_down"]

"""Sparse FFN kernels: a plain torch reference for each."""

from caprese.kernels.sparse_ffn import Packed, pack, packed_ffn, sparse_ffn

__all__ = ["Packed", "pack", "packed_ffn", "sparse_ffn"]

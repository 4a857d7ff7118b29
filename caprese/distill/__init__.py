"""The recovery branches are learned from the dense model: layer by layer in closed form, then end to end."""

from caprese.distill.batches import Batch, make_batches
from caprese.distill.end_to_end import EndToEnd, HeldOut
from caprese.distill.layerwise import Layerwise, accumulate, allocate_ranks, fit_layer, new_moments
from caprese.distill.mixer import Alignment, align, alignment, hidden_alignment, match_scale

__all__ = [
    "Alignment",
    "Batch",
    "EndToEnd",
    "HeldOut",
    "Layerwise",
    "accumulate",
    "align",
    "alignment",
    "allocate_ranks",
    "fit_layer",
    "hidden_alignment",
    "make_batches",
    "match_scale",
    "new_moments",
]

"""The recovery branches are learned from the dense model: layer by layer in closed form, then end to end.

`fit` does all of it for an applied model and samples.
"""

from caprese.distill.align import Alignment, align, prepare
from caprese.distill.batches import Batch, make_batches
from caprese.distill.checkpoints import Checkpoints
from caprese.distill.end_to_end import EndToEnd
from caprese.distill.fit import Branches, Distillation, Fitted, fit
from caprese.distill.layerwise import Layerwise, accumulate, allocate_ranks, fit_layer, new_moments
from caprese.distill.teacher import HeldOut, Teacher

__all__ = [
    "Alignment",
    "Batch",
    "Branches",
    "Checkpoints",
    "Distillation",
    "EndToEnd",
    "Fitted",
    "HeldOut",
    "Layerwise",
    "Teacher",
    "accumulate",
    "align",
    "allocate_ranks",
    "fit",
    "fit_layer",
    "make_batches",
    "new_moments",
    "prepare",
]

"""What the parts of a model family are called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of the parts of one model family, as attribute paths.

    `layers` is relative to the causal LM, `ffn` and `attention` to a decoder layer, the rest to the FFN.
    """

    layers: str = "model.layers"
    ffn: str = "mlp"
    """Empty: the parts sit on the decoder layer itself."""
    gate: str = "gate_proj"
    """Empty: a plain FFN, down(act(up(x))). The same as `up`: one matrix holds gate over up."""
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    """Every linear layer of the attention, the output projection last."""
    width: str = "intermediate_size"
    """The config's name for the number of neurons."""
    norm_after_ffn: bool = False
    """Whether the FFN's output passes a norm before it is added to the hidden state."""

"""A recovered Llama in vLLM: prompts dense, generated tokens through what their prompt chose, and the branch.

vLLM's own model, with other FFNs. Which rows of a batch are prompt is known to the runner alone, so the worker is ours
too. It wants vLLM's V1 runner without compilation, on one device, and no cached prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.platforms import current_platform

from caprese.adapters import Adapter, Fingerprint
from caprese.adapters.fingerprint import noted
from caprese.efficient_methods import Method
from caprese.errors import CapreseError
from caprese.models import FAMILIES, FFN
from caprese.serving import ARCHITECTURE
from caprese.serving.spans import Layer, Span, spans_of

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

#: in the model's config: the adapter's directory or hub id
ADAPTER = "caprese_adapter"
_BRANCH = "base_model.model.model.layers.{}.mlp.recovery.lora_{}"

#: what the runner says of the pass that is under way; None where it says nothing, as while memory is profiled
_now: list[Span] | None = None
_worked = False


class Worker(_Worker):
    """vLLM's worker, whose runner says which rows are whose (`--worker-cls caprese.serving.vllm.Worker`)."""

    def init_device(self) -> None:
        """See vLLM's."""
        global _worked
        super().init_device()
        if self.use_v2_model_runner:
            raise CapreseError("caprese's FFNs want vLLM's V1 runner; set VLLM_USE_V2_MODEL_RUNNER=0")
        # the worker makes the runner of its platform, and offers no other way to give it another
        runner = type(self.model_runner)
        self.model_runner.__class__ = type(runner.__name__, (_Spans, runner), {})
        _worked = True


class _Spans:
    """Says which rows are whose before each pass of a runner."""

    def _model_forward(self, *args: Any, **more: Any) -> Any:
        global _now
        runner: Any = self
        batch, starts = runner.input_batch, runner.query_start_loc.np
        _now = spans_of(
            (
                name,
                int(starts[i + 1] - starts[i]),
                int(batch.num_computed_tokens_cpu[i]),
                int(batch.num_prompt_tokens[i]),
            )
            for i, name in enumerate(batch.req_ids)
        )
        try:
            return super()._model_forward(*args, **more)  # type: ignore[misc]
        finally:
            _now = None
            if isinstance(runner.model, CapreseLlamaForCausalLM):
                for layer in runner.model.acting:
                    layer.forget(runner.requests)


class _FFN(LlamaMLP):
    """vLLM's FFN, and what is done in its place where an adapter acts on the layer."""

    layer: Layer | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _now is None or self.layer is None:
            return super().forward(x)
        return self.layer.forward(x, _now)

    def act(self, method: Method, branch: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> Layer:
        """From now on, with the weights that are loaded; what acts."""
        parts = nn.Module()
        for name, known in (("gate_up_proj", self.gate_up_proj), ("down_proj", self.down_proj)):
            rows, columns = known.weight.shape
            linear = nn.Linear(columns, rows, known.bias is not None, device="meta")
            linear.weight = nn.Parameter(known.weight.data, requires_grad=False)
            if known.bias is not None:
                linear.bias = nn.Parameter(known.bias.data, requires_grad=False)
            parts.add_module(name, linear)
        parts.add_module("activation_fn", nn.SiLU())
        first, second, bias = (None if t is None else t.to(self.down_proj.weight) for t in branch)
        assert first is not None and second is not None
        self.layer = Layer(method, FFN(parts, FAMILIES["phi3"]), (first, second, bias))
        return self.layer


class _DecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config)
        config = config or vllm_config.model_config.hf_config
        self.mlp = _FFN(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            bias=getattr(config, "mlp_bias", False),
            prefix=f"{prefix}.mlp",
        )
        for part in (self.mlp.gate_up_proj, self.mlp.down_proj):
            part._cpu_skip_gemm_dispatch = True  # vLLM would pack the weights for its own kernel and let them go


class CapreseLlamaForCausalLM(LlamaForCausalLM):
    """A Llama-shaped base with a recovery adapter; the config's `architectures` and `caprese_adapter` ask for it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """
        Raises:
            CapreseError: a setting of vLLM that it does not go with, or an adapter that is not for it.
        """
        _check_engine(vllm_config)
        self.adapter = _open(vllm_config)
        self.acting: list[Layer] = []
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_DecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See vLLM's; refuses a base that the adapter is not for.

        Raises:
            CapreseError: other weights, or a damaged adapter.
        """
        seen = Fingerprint()
        loaded: set[str] = super().load_weights(noted(weights, self.config.tie_word_embeddings, seen))
        known = self.adapter.sidecar.base.fingerprint
        if wrong := [group for group, value in known.items() if seen.digests()[group] != value]:
            raise CapreseError(
                f"{self.adapter} was made for {self.adapter.sidecar.base}, and this base has other weights "
                f"({', '.join(wrong)}); serve that base"
            )
        (method,), tensors = self.adapter.methods, self.adapter.weights()
        for number, own in method.by_layer(len(self.model.layers)).items():
            branch = [_BRANCH.format(number, name) for name in ("A.weight", "B.weight", "B.bias")]
            mlp = self.model.layers[number].mlp
            self.acting.append(mlp.act(own, (tensors[branch[0]], tensors[branch[1]], tensors.get(branch[2]))))
        return loaded


def _check_engine(config: VllmConfig) -> None:
    parallel = config.parallel_config
    wrong = {
        "one device (tensor and pipeline parallel sizes of 1)": parallel.tensor_parallel_size
        * parallel.pipeline_parallel_size
        > 1,
        "its own worker; give --worker-cls caprese.serving.vllm.Worker": not _worked,
        "no cached prompts; give --no-enable-prefix-caching": bool(config.cache_config.enable_prefix_caching),
        "no compilation; give --enforce-eager": config.compilation_config.mode != CompilationMode.NONE,
        "weights that are not quantised": config.quant_config is not None,
        "no LoRA": config.lora_config is not None,
        "no speculative decoding": config.speculative_config is not None,
        "no KV connector": config.kv_transfer_config is not None,
    }
    if found := [what for what, so in wrong.items() if so]:
        raise CapreseError(f"{ARCHITECTURE} wants {found[0]}")


def _open(config: VllmConfig) -> Adapter:
    name = getattr(config.model_config.hf_config, ADAPTER, None)
    if not isinstance(name, str):
        raise CapreseError(
            f'{ARCHITECTURE} wants an adapter; give --hf-overrides \'{{"{ADAPTER}": "DIRECTORY", ...}}\''
        )
    adapter = Adapter.open(name)
    methods = adapter.methods
    if len(methods) != 1 or methods[0].acts_on != {"rows"} or methods[0].learns != {"prompt"}:
        raise CapreseError(f"{adapter} is not of neurons that each prompt chooses alone; serve griffin without a prior")
    if adapter.sidecar.reselect_every is not None or adapter.sidecar.prefill != "dense":
        raise CapreseError(f"{adapter} chooses anew, or its prompts do not run dense; make one without reselection")
    return adapter

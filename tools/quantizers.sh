#!/usr/bin/env bash
# Compare the quantizers of igd ids on the industrial dataset, with co-occurrence and MiniLM
# embeddings: the table of docs/results/quantizers.md. CPU is enough, about 20 minutes on one core.
#   make setup && source .venv/bin/activate && bash tools/quantizers.sh ../shared/data
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" out=runs/quantizers
export OMP_NUM_THREADS=1
python -m pip install -q -c constraints.txt -e '.[embed]'  # MiniLM

igd prepare --source sequences --input "$source/industrial" --protocol leave-one-out --max_history 20 \
    --name industrial --domain "industrial and scientific products" --output "$out/data"
igd embed --dataset "$out/data" --cooccurrence 64 --output "$out/cooccurrence"
igd embed --dataset "$out/data" --model minilm --output "$out/minilm"

for embeddings in minilm cooccurrence; do
    for quantizer in rq-kmeans-balanced rq-kmeans rq-vae pq; do
        ids="$out/$embeddings-$quantizer" flags=()
        [ "$quantizer" = rq-vae ] && flags=(--epochs 200 --batch_size 256 --hidden 512 256 128 64)
        [ -e "$ids" ] && continue
        TIMEFORMAT="%U"
        { time igd ids --dataset "$out/data" --embeddings "$out/$embeddings" --quantizer "$quantizer" \
            "${flags[@]}" --output "$ids" >"$ids.log" 2>&1; } 2>"$ids.seconds"
        igd tokenizer --dataset "$ids" --codes_only --output "$ids.tokenizer" >"$ids.log"
        igd stats --dataset "$ids" --tokenizer "$ids.tokenizer" --item_kind semantic-id --json \
            >"$ids.json"
    done
done

python - "$out" <<'PYTHON'
import json, math, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    made = json.loads((path.with_suffix("") / "dataset.json").read_text())["semantic_ids"]
    stats = json.loads(path.read_text())
    bits = [math.log2(perplexity) for perplexity in made["perplexity"]]
    codes = stats["target_tokens"] - stats["train_rows"]  # without EOS, which decides nothing
    decided = (stats["zero_ig_tokens"] - stats["train_rows"]) / codes
    print(
        f"| {path.stem} | {' '.join(f'{share:.0%}' for share in made['use'])} "
        f"| {' '.join(f'{entropy:.2f}' for entropy in bits)} | {made['collision_rate_before']:.2%} "
        f"| {made['changed_items']} | {made['reconstruction_error']:.3f} | {decided:.1%} "
        f"| {float(path.with_suffix('.seconds').read_text()):.0f} |"
    )
PYTHON

#!/usr/bin/env bash
# Makes the ledger: our numbers beside published ones (runs/baselines/report). Datasets and semantic IDs, then
# every row of tools/sweeps/ledger.yaml, then each baseline's test rows once more with the items that the user
# has met before, then the report. CPU is enough: about 20 CPU-hours. A second start resumes an interrupted
# one. JOBS is the number of cores (default 2).
#   make setup && source .venv/bin/activate && bash tools/ledger.sh ../shared/data [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" jobs="${2:-2}" out=runs/baselines
export OMP_NUM_THREADS=1
python -m pip install -q -c constraints.txt -e '.[embed]'  # MiniLM

for name in beauty-2014 sports-2014 instruments; do
    [ -f "$out/$name/data/dataset.json" ] || igd prepare --source sequences --input "$source/$name" \
        --protocol leave-one-out --max_history 50 --name "$name" --domain products --output "$out/$name/data"
done

# Items may share a title, but no semantic ID. So baselines rank single items, as published ones do.
# Instruments has its own semantic IDs. Sports also gets those of RQ-VAE.
for name in beauty-2014 sports-2014; do
    made="$out/$name"
    [ -f "$made/minilm/embeddings.npy" ] || igd embed --dataset "$made/data" --model minilm --output "$made/minilm"
    [ -f "$made/ids/dataset.json" ] || igd ids --dataset "$made/data" --embeddings "$made/minilm" --output "$made/ids"
done
sports="$out/sports-2014"
[ -f "$sports-rqvae/ids/dataset.json" ] || igd ids --dataset "$sports/data" --embeddings "$sports/minilm" \
    --quantizer rq-vae --epochs 200 --batch_size 1024 --hidden 512 256 128 64 --output "$sports-rqvae/ids"

# The vocabularies of generative models.
for data in "$sports/ids" "$sports-rqvae/ids" "$out/instruments/data"; do
    tokenizer="$(dirname "$data")/tokenizer"
    [ -f "$tokenizer/tokenizer.json" ] || igd tokenizer --dataset "$data" --codes_only --output "$tokenizer"
done

code=0
igd sweep tools/sweeps/ledger.yaml --output "$out/ledger" --jobs "$jobs" || code=$?
# 85: stopped by a signal; 2: bad input. With 1 some row is not finished, and the report names it.
[ "$code" -le 1 ] || exit "$code"

# The sweep's test lists leave out what the user has met before (`--exclude_seen auto` decides so on these
# datasets). This ranks the baselines' test rows once more, with such items.
for run in "$out/ledger"/*; do
    [ -d "$run/eval/test" ] && grep -q '^recommender:' "$run/config.yaml" || continue
    [ -f "$run/eval/seen-no/metrics.json" ] || igd eval --model "$run/model" --split test --exclude_seen no \
        --dataset "$(sed -n 's/^dataset: //p' "$run/config.yaml")" --output_dir "$run/eval/seen-no"
done

igd report "$out/ledger" --published tools/published.yaml --output "$out/report" --examples 0 \
    --command "bash tools/ledger.sh ../shared/data"
exit "$code"

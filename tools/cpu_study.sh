#!/usr/bin/env bash
# Make the published study: datasets, item embeddings, semantic IDs and tokenizers, then every row of
# tools/sweeps/cpu.yaml, then the report docs/results/cpu-study. CPU is enough: about 4 CPU-hours. A
# second start resumes an interrupted one. JOBS is the number of cores (default 2).
#   make setup && source .venv/bin/activate && bash tools/cpu_study.sh ../shared/data [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" jobs="${2:-2}" out=runs/cpu
export OMP_NUM_THREADS=1
python -m pip install -q -c constraints.txt -e '.[embed]'  # MiniLM, for the items' embeddings

dataset() {  # NAME DOMAIN [options of igd prepare]
    igd prepare --source sequences --input "$source/$1" --protocol leave-one-out --name "$1" --domain "$2" \
        --output "$out/$1/data" "${@:3}"
}
codes() {  # DATASET: a tokenizer of its semantic ID codes
    igd tokenizer --dataset "$out/$1/data" --codes_only --output "$out/$1/tokenizer"
}

dataset instruments "musical instruments" --max_history 20
igd embed --dataset "$out/instruments/data" --cooccurrence 64 --output "$out/instruments/embeddings"
codes instruments

dataset industrial "industrial and scientific products" --max_history 20
igd embed --dataset "$out/industrial/data" --model minilm --output "$out/industrial/embeddings"
igd tokenizer --dataset "$out/industrial/data" --vocab_size 4096 --output "$out/industrial/tokenizer"
for quantizer in rq-vae pq; do
    ids="industrial-${quantizer%-vae}" flags=()
    [ "$quantizer" = rq-vae ] && flags=(--epochs 200 --batch_size 256 --hidden 512 256 128 64)
    igd ids --dataset "$out/industrial/data" --embeddings "$out/industrial/embeddings" \
        --quantizer "$quantizer" "${flags[@]}" --output "$out/$ids/data"
    codes "$ids"
    ln -sfn ../industrial/embeddings "$out/$ids/embeddings"
done

dataset books-small books --max_history 5 --num_users 4000 --seed 0
igd tokenizer --dataset "$out/books-small/data" --vocab_size 8192 --output "$out/books-small/tokenizer"

code=0
igd sweep tools/sweeps/cpu.yaml --output "$out/runs" --jobs "$jobs" || code=$?
# 85: stopped by a signal; 2: bad input. With 1 some row is not finished, and the report names it.
[ "$code" -le 1 ] || exit "$code"
igd report "$out/runs" --output docs/results/cpu-study --examples 0 \
    --command "bash tools/cpu_study.sh ../shared/data"
exit "$code"

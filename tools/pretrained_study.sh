#!/usr/bin/env bash
# Title models on games-2015: small ones from random weights with five seeds (tools/sweeps/titles.yaml), and
# SmolLM2-135M, a pretrained language model, with a small model on as many rows (tools/sweeps/pretrained.yaml),
# each with a report. CPU is enough: about 11.5 CPU-hours. A second start resumes an interrupted one. JOBS is the
# number of cores (default 2).
#   make setup && source .venv/bin/activate && bash tools/pretrained_study.sh ../shared/data [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" jobs="${2:-2}" out=runs/pretrained
export OMP_NUM_THREADS=1

data="$out/games-2015/data"
[ -f "$data/dataset.json" ] || igd prepare --source d3-csv --input "$source/games-2015" --protocol given \
    --name games-2015 --domain "video games" --output "$data"
[ -d "$out/games-2015/tokenizer" ] || igd tokenizer --dataset "$data" --vocab_size 4096 \
    --output "$out/games-2015/tokenizer"
bash tools/smollm2.sh runs/smollm2/SmolLM2-135M

for study in titles pretrained; do
    code=0
    igd sweep "tools/sweeps/$study.yaml" --output "$out/$study" --jobs "$jobs" || code=$?
    # 85: stopped by a signal; 2: bad input. With 1 some row is not finished, and the report names it.
    [ "$code" -le 1 ] || exit "$code"
    igd report "$out/$study" --output "$out/$study-report" --examples 0 \
        --command "bash tools/pretrained_study.sh ../shared/data"
done
exit "$code"

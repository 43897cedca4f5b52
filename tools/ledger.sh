#!/usr/bin/env bash
# Makes the ledger: our numbers beside published ones (runs/baselines/report). Datasets, then every row of
# tools/sweeps/ledger.yaml, then each run's test rows with and without the items that the user has met
# before, then the report. CPU is enough: about 9 CPU-hours. A second start resumes an interrupted one. JOBS
# is the number of cores (default 2).
#   make setup && source .venv/bin/activate && bash tools/ledger.sh ../shared/data [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" jobs="${2:-2}" out=runs/baselines
export OMP_NUM_THREADS=1

for name in beauty-2014 sports-2014 instruments; do
    [ -f "$out/$name/data/dataset.json" ] || igd prepare --source sequences --input "$source/$name" \
        --protocol leave-one-out --max_history 50 --name "$name" --domain products --output "$out/$name/data"
done

code=0
igd sweep tools/sweeps/ledger.yaml --output "$out/ledger" --jobs "$jobs" || code=$?
# 85: stopped by a signal; 2: bad input. With 1 some row is not finished, and the report names it.
[ "$code" -le 1 ] || exit "$code"

# The sweep's test lists leave out what the user has met before (`--exclude_seen auto` decides so on these
# datasets). This ranks the test rows once more, with such items.
for name in beauty-2014 sports-2014 instruments; do
    for run in "$out/ledger/$name"-*; do
        [ ! -d "$run/eval/test" ] || [ -f "$run/eval/seen-no/metrics.json" ] || igd eval --model "$run" \
            --dataset "$out/$name/data" --split test --exclude_seen no --output_dir "$run/eval/seen-no"
    done
done

igd report "$out/ledger" --published tools/published.yaml --output "$out/report" --examples 0 \
    --command "bash tools/ledger.sh ../shared/data"
exit "$code"

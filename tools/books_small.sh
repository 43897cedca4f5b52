#!/usr/bin/env bash
# Make the results of docs/results/books-small.md from the data: β ∈ {1.0, 0.1}, two seeds, the grid of
# α, on two CPU ranks. A second start resumes an interrupted one.
#   tools/books_small.sh ../shared/data/books-small [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
source="$1" out="${2:-runs/books-small}"
export OMP_NUM_THREADS=1

igd prepare --source sequences --input "$source" --protocol leave-one-out --max_history 10 \
    --num_users 8000 --seed 0 --name books-small --domain books --output "$out/data"
igd tokenizer --dataset "$out/data" --vocab_size 8192 --output "$out/tokenizer"

for seed in 0 1; do
    for beta in 1.0 0.1; do
        run="$out/beta-$beta-seed-$seed"
        torchrun --standalone --nproc_per_node 2 igd_ds/train.py --ds_config ds_configs/zero1-fp32.json \
            --dataset "$out/data" --model_config tools/models/qwen2-1m.json \
            --tokenizer "$out/tokenizer" --objective igd --igd_beta "$beta" --global_batch_size 16 \
            --learning_rate 2e-3 --epochs 2 --max_length 512 --validation_rows 2000 \
            --validate_every 1600 --patience 0 --seed "$seed" --log_every 50 --packing rows \
            --batching rows --output_dir "$run" --resume auto
    done
done
for seed in 0 1; do
    for beta in 1.0 0.1; do
        run="$out/beta-$beta-seed-$seed"
        for split in valid test; do
            torchrun --standalone --nproc_per_node 2 igd_ds/eval.py --model "$run/model" \
                --dataset "$out/data" --split "$split" --alpha 0 0.1 0.2 0.3 0.4 --num_beams 10 \
                --num_rows 2000 --batch_size 32 --output_dir "$run/eval/$split"
        done
    done
done

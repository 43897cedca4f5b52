#!/usr/bin/env bash
# Trains the models that tools/bench/search.py and docs/search.md search with: books-small and
# industrial (titles), instruments (semantic IDs). Each is a Qwen2 of 5 M parameters, trained on row
# trees. The last one is SmolLM2-135M, a pretrained model, fine-tuned on games-2015 for 300 steps of
# 8 rows: about an hour on one core. After an interruption, start it again and it goes on. RANKS is
# the number of CPU processes. It needs the virtual environment's bin folder on the PATH.
#
#   [RANKS=2] tools/search_models.sh ../shared/data [runs/search]
set -euo pipefail
cd "$(dirname "$0")/.."
data="$1" out="${2:-runs/search}"
export OMP_NUM_THREADS=1

prepare() {  # NAME DOMAIN MAX_HISTORY NUM_USERS [options of igd tokenizer]
    igd prepare --source sequences --input "$data/$1" --protocol leave-one-out \
        --max_history "$3" --num_users "$4" --seed 0 --name "$1" --domain "$2" \
        --output "$out/$1/data"
    igd tokenizer --dataset "$out/$1/data" --vocab_size 8192 --output "$out/$1/tokenizer" "${@:5}"
}

train() {  # NAME [options of igd train]
    torchrun --standalone --nproc_per_node "${RANKS:-2}" igd_ds/train.py --ds_config ds_configs/zero1-fp32.json \
        --dataset "$out/$1/data" --model_config tools/models/qwen2-5m.json \
        --tokenizer "$out/$1/tokenizer" --max_length 512 --validation_rows 500 --patience 0 --seed 0 \
        --log_every 50 --output_dir "$out/$1/run" --resume auto "${@:2}"
}

prepare books-small books 5 5000
train books-small --objective uniform --global_batch_size 16 --learning_rate 2e-3 --epochs 3

prepare instruments instruments 10 3000 --semantic_ids
train instruments --objective uniform --global_batch_size 32 --learning_rate 1e-3 --epochs 1

prepare industrial "industrial products" 10 0
train industrial --objective igd --igd_beta 0.1 --global_batch_size 32 --learning_rate 1e-3 --epochs 2

tools/smollm2.sh "$out/smollm2"
igd prepare --source d3-csv --input "$data/games-2015" --protocol given --name games-2015 \
    --domain "video games" --output "$out/games-2015/data"
python igd_ds/train.py --ds_config ds_configs/zero1-fp32.json --dataset "$out/games-2015/data" \
    --model_name_or_path "$out/smollm2" --objective uniform --prompt alpaca --global_batch_size 8 \
    --learning_rate 1e-4 --max_steps 300 --max_length 512 --validation_rows 32 \
    --validate_every 300 --patience 0 --seed 0 --save_every 50 --keep_checkpoints 1 \
    --output_dir "$out/games-2015/run" --resume auto

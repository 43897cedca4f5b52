#!/usr/bin/env bash
# The trained models that tools/bench/search.py searches with: books-small, industrial (titles) and instruments (semantic IDs), on
# two CPU ranks, about 45 minutes. Resumable: start it again.
#   tools/search_models.sh ../shared/data [runs/search]
set -euo pipefail
cd "$(dirname "$0")/.."
data="$1" out="${2:-runs/search}"
export OMP_NUM_THREADS=1

prepare() {  # NAME DOMAIN NUM_USERS [options of train_tokenizer.py]
    python tools/prepare_data.py --source sequences --input "$data/$1" --protocol leave-one-out --max_history 5 \
        --num_users "$3" --seed 0 --name "$1" --domain "$2" --output "$out/$1/data"
    python tools/train_tokenizer.py --dataset "$out/$1/data" --vocab_size 8192 --output "$out/$1/tokenizer" "${@:4}"
}
train() {  # NAME EPOCHS
    torchrun --standalone --nproc_per_node 2 igd_ds/train.py --ds_config ds_configs/zero1-fp32.json --dataset "$out/$1/data" \
        --model_config tools/models/qwen2-5m.json --tokenizer "$out/$1/tokenizer" --weighting uniform \
        --global_batch_size 16 --learning_rate 2e-3 --epochs "$2" --max_length 512 --validation_rows 500 --patience 0 \
        --seed 0 --log_every 50 --output_dir "$out/$1/run" --resume auto
}
prepare books-small books 5000
prepare instruments instruments 3000 --semantic_ids
prepare industrial "industrial products" 0
train books-small 3
train instruments 2
train industrial 3

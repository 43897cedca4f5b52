#!/usr/bin/env bash
# Trains and evaluates the models that the catalogue's softmax is measured with: games-2015 and books-small
# (titles), instruments (semantic IDs), in list form, each a Qwen2 of 1.5 M parameters from random weights, 2
# epochs, on one core each. The first three models (msl, seed 0) are those of tools/bench/catalogue_softmax.py.
# After an interruption, start it again and it goes on. Needs the virtual environment's bin folder on the PATH.
#
#   tools/catalogue_softmax.sh ../shared/data [runs/softmax]
set -euo pipefail
cd "$(dirname "$0")/.."
data="$1" out="${2:-runs/softmax}"
export OMP_NUM_THREADS=1

prepare() {  # NAME DOMAIN SOURCE PROTOCOL [options of igd prepare]
    [ -f "$out/$1/data/dataset.json" ] || igd prepare --source "$3" --input "$data/$1" --protocol "$4" \
        --name "$1" --domain "$2" --output "$out/$1/data" "${@:5}"
}

tokenizer() {  # NAME [options of igd tokenizer]
    [ -d "$out/$1/tokenizer" ] || igd tokenizer --dataset "$out/$1/data" --output "$out/$1/tokenizer" "${@:2}"
}

train() {  # DATASET ITEM_KIND OBJECTIVE SEED
    local flags=(--objective msl --msl_tau 1)
    case "$3" in
        uniform) flags=(--objective uniform) ;;
        igd) flags=(--objective igd --igd_beta 0.2) ;;
        msl-adaptive) flags=(--objective msl --msl_tau adaptive) ;;
        msl-beta) flags+=(--igd_beta 0.2) ;;
    esac
    python igd_ds/train.py --ds_config ds_configs/zero1-batch64-fp32.json --dataset "$out/$1/data" \
        --tokenizer "$out/$1/tokenizer" --model_config tools/models/qwen2-list.json --item_kind "$2" \
        --prompt list --max_length 512 --global_batch_size 64 --learning_rate 3e-3 --epochs 2 \
        --patience 0 --validation_rows 500 --log_every 50 --save_every 100 --keep_checkpoints 1 \
        --resume auto --output_dir "$out/$1/$3-$4" --seed "$4" "${flags[@]}"
}

evaluate() {  # DATASET OBJECTIVE SEED: the same 2,000 test rows in three ways
    local run="$out/$1/$2-$3" temperature
    for way in "full beam" "masked beam" "masked exact"; do
        read -r softmax search <<< "$way"
        # Under the full softmax a model trained by msl is searched at T = 1 too.
        temperature=()
        [ "$softmax" = full ] && temperature=(--temperature 1)
        python igd_ds/eval.py --model "$run/model" --dataset "$out/$1/data" --split test --num_rows 2000 \
            --softmax "$softmax" --search "$search" "${temperature[@]}" --exclude_seen no \
            --output_dir "$run/eval/$softmax-$search"
    done
}

prepare games-2015 "video games" d3-csv given
tokenizer games-2015 --vocab_size 4096
prepare instruments "musical instruments" sequences leave-one-out --max_history 10
tokenizer instruments --codes_only
prepare books-small books sequences leave-one-out --max_history 5 --num_users 5000 --seed 0
tokenizer books-small --vocab_size 4096

train games-2015 text msl 0
train instruments semantic-id msl 0
train books-small text msl 0
for seed in 0 1 2; do
    for objective in uniform msl igd msl-adaptive msl-beta; do
        train games-2015 text "$objective" "$seed"
        evaluate games-2015 "$objective" "$seed"
        train instruments semantic-id "$objective" "$seed"
        evaluate instruments "$objective" "$seed"
    done
done

#!/usr/bin/env bash
# Trains and evaluates the models that the catalogue's softmax is measured with: games-2015 and books-small
# (titles), instruments (semantic IDs), in list form, each a Qwen2 of 1.5 M parameters from random weights, on
# one core each. The first three models (msl, seed 0, 2 epochs) are those of tools/bench/catalogue_softmax.py.
# The study trains games-2015 for 2 epochs and instruments for 1. Then `igd prefer` goes on from the best
# objective's models: s-dpo with four kinds of negatives and, for random ones, with the target's likelihood
# (--sft_weight) and with a tenth of the learning rate, 150 steps each; grpo with two rewards and with credit by
# gain, 100 steps each. After an interruption, start it again and it goes on. Needs the virtual environment's
# bin folder on the PATH.
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

train() {  # DATASET ITEM_KIND OBJECTIVE SEED EPOCHS
    local flags=(--objective msl --msl_tau 1)
    case "$3" in
        uniform) flags=(--objective uniform) ;;
        igd) flags=(--objective igd --igd_beta 0.2) ;;
        msl-adaptive) flags=(--objective msl --msl_tau adaptive) ;;
        msl-beta) flags+=(--igd_beta 0.2) ;;
    esac
    python igd_ds/train.py --ds_config ds_configs/zero1-batch64-fp32.json --dataset "$out/$1/data" \
        --tokenizer "$out/$1/tokenizer" --model_config tools/models/qwen2-list.json --item_kind "$2" \
        --prompt list --max_length 512 --global_batch_size 64 --learning_rate 3e-3 --epochs "$5" \
        --patience 0 --validation_rows 500 --log_every 50 --save_every 100 --keep_checkpoints 1 \
        --resume auto --output_dir "$out/$1/$3-$4" --seed "$4" "${flags[@]}"
}

evaluate() {  # DATASET NAME SEED: validation, then the same 2,000 test rows in three ways
    rank "$1" "$2-$3" valid valid masked exact
    rank "$1" "$2-$3" full-beam test full beam --temperature 1  # at T = 1 also what msl has trained
    rank "$1" "$2-$3" masked-beam test masked beam
    rank "$1" "$2-$3" masked-exact test masked exact
}

rank() {  # DATASET RUN NAME SPLIT SOFTMAX SEARCH [options of igd eval]
    python igd_ds/eval.py --model "$out/$1/$2/model" --dataset "$out/$1/data" --split "$4" --num_rows 2000 \
        --softmax "$5" --search "$6" --exclude_seen no --output_dir "$out/$1/$2/eval/$3" "${@:7}"
}

best_objective() {  # DATASET: the objective with the best mean NDCG@10 on validation, over its seeds
    python - "$out/$1" <<'PYTHON'
import json, sys
from pathlib import Path

scores = {}
for file in Path(sys.argv[1]).glob("*-[0-9]/eval/valid/metrics.json"):
    objective = file.parts[-4].rpartition("-")[0]
    scores.setdefault(objective, []).append(json.loads(file.read_text())["alpha"]["0.0"]["item_match"]["ndcg@10"])
print(max(scores, key=lambda name: sum(scores[name]) / len(scores[name])))
PYTHON
}

stage() {  # DATASET OBJECTIVE SEED NAME MAX_STEPS [options of igd prefer]: ranks test rows if validation improved
    local run="$out/$1/$4-$3"
    python igd_ds/prefer.py --ds_config ds_configs/zero1-batch64-fp32.json --dataset "$out/$1/data" \
        --model "$out/$1/$2-$3" --softmax masked --global_batch_size 64 --learning_rate 3e-4 --max_steps "$5" \
        --validate_every 50 --validation_rows 500 --patience 0 --stop_margin 0.01 --log_every 10 \
        --keep_checkpoints 1 --resume auto --output_dir "$run" --seed "$3" "${@:6}"
    grep -q '"best_step": 0,' "$run/summary.json" || evaluate "$1" "$4" "$3"
}

prepare games-2015 "video games" d3-csv given
tokenizer games-2015 --vocab_size 4096
prepare instruments "musical instruments" sequences leave-one-out --max_history 10
tokenizer instruments --codes_only
prepare books-small books sequences leave-one-out --max_history 5 --num_users 5000 --seed 0
tokenizer books-small --vocab_size 4096

# The models of the benchmark.
train games-2015 text msl 0 2
train instruments semantic-id msl 0 2
train books-small text msl 0 2

study() {  # DATASET ITEM_KIND EPOCHS
    local seed objective best negatives
    for seed in 0 1 2; do
        for objective in uniform msl igd msl-adaptive msl-beta; do
            train "$1" "$2" "$objective" "$seed" "$3"
            evaluate "$1" "$objective" "$seed"
        done
    done

    best=$(best_objective "$1")
    for seed in 0 1; do
        for negatives in random popularity sibling beam; do
            stage "$1" "$best" "$seed" "s-dpo-$negatives" 150 --objective s-dpo --negatives "$negatives"
        done
        stage "$1" "$best" "$seed" s-dpo-sft 150 --objective s-dpo --negatives random --sft_weight 1
        stage "$1" "$best" "$seed" s-dpo-slow 150 --objective s-dpo --negatives random --learning_rate 3e-5
        stage "$1" "$best" "$seed" grpo-rule 100 --objective grpo --reward rule
        stage "$1" "$best" "$seed" grpo-rank 100 --objective grpo --reward rank
        stage "$1" "$best" "$seed" grpo-gain 100 --objective grpo --reward rule --token_credit gain
    done
}

study games-2015 text 2

# The same data with one epoch: 15 trainings of two epochs do not fit into the budget.
mkdir -p "$out/instruments-1-epoch"
for part in data tokenizer; do ln -sfn "../instruments/$part" "$out/instruments-1-epoch/$part"; done
study instruments-1-epoch semantic-id 1

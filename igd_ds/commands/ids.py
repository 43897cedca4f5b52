"""Give a dataset's items semantic IDs: learned from embeddings, or existing ones made unique.

    igd ids --dataset DATASET --embeddings EMBEDDINGS --output DATASET2
    igd ids --dataset DATASET --embeddings EMBEDDINGS --quantizer rq-vae --levels 4 --codes 256 \\
        --collisions reassign --output DATASET2
    igd ids --dataset DATASET --quantizer existing --collisions reassign --output DATASET2

DATASET2 is a copy of DATASET with new semantic IDs and a new data card; its dataset.json has a
report under "semantic_ids". --quantizer existing keeps the IDs that the dataset has, resolves their
collisions and measures them. DATASET2.quantizer/, or --log_dir, holds tensorboard/,
quantizer.safetensors (codebooks and networks) and semantic_ids.json (the report, and the purity
gain by token of MTC Figure 1).

If DATASET2 is complete and was made from the same request, the command does nothing. If DATASET2 or
the log folder was made from another request, the command refuses.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.semantic_ids.assign import EXISTING, ONLY_RQ_VAE, IDRequest, assign_ids
from igd_ds.semantic_ids.collisions import COLLISIONS, LEVEL_LETTERS
from igd_ds.semantic_ids.quantizers import QUANTIZERS, QuantizerOptions

DEFAULTS = asdict(QuantizerOptions())
HELP = {
    "levels": "codes per ID",
    "codes": "size of a level's codebook",
    "seed": "seed of the training and of the random choices that resolve collisions",
    "epochs": "rq-vae: passes over the items",
    "learning_rate": "rq-vae: learning rate of Adam",
    "batch_size": "rq-vae: items per step",
    "latent": "rq-vae: width of the latent space",
    "commitment": "rq-vae: weight of the commitment term",
    "sinkhorn": "rq-vae: regularisation of evenly balanced assignment in training, such as 0.003; "
    "0 is off",
    "ema": "rq-vae: decay of moving-average codebooks, such as 0.99; 0 trains them by gradient",
    "cf_weight": "rq-vae: α, weight of LETTER's collaborative loss with --cf_run",
    "cf_temperature": "rq-vae: τ of LETTER's collaborative loss with --cf_run",
    "diversity_weight": "rq-vae: β, weight of LETTER's diversity loss, such as 1e-4; 0 is off",
}
"""Flags with one value, each a field of QuantizerOptions."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a flag that the chosen quantizer does not use is an error."""
    parser = FlagParser(
        prog="igd ids", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DATASET2", help="dataset folder to make"
    )
    parser.add_argument(
        "--quantizer",
        choices=[*QUANTIZERS, EXISTING],
        default=next(iter(QUANTIZERS)),
        help=f"how codes are learned (default: {next(iter(QUANTIZERS))}: each code of a level has "
        f"at most ⌈items / codes⌉ items); {EXISTING} keeps the IDs that the dataset has",
    )
    parser.add_argument("--embeddings", type=Path, help="folder that igd embed made")
    parser.add_argument(
        "--collisions",
        choices=COLLISIONS,
        default=COLLISIONS[0],
        help="what happens to items with equal IDs: another last code (at random; "
        f"{next(iter(QUANTIZERS))} swaps it with another item), a further level that numbers them, "
        f"or nothing (default: {COLLISIONS[0]})",
    )
    parser.add_argument(
        "--log_dir",
        type=Path,
        help="folder to make for logs, quantizer and report (default: DATASET2.quantizer)",
    )
    for name, what in HELP.items():
        default = DEFAULTS[name]
        parser.add_argument(f"--{name}", type=type(default), help=f"{what} (default: {default})")
    parser.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        help="rq-vae: widths of the encoder's hidden layers "
        f"(default: {' '.join(map(str, DEFAULTS['hidden']))})",
    )
    parser.add_argument(
        "--cf_run",
        type=Path,
        metavar="RUN",
        help="rq-vae: finished run of igd baseline (sasrec or lrurec) on the same dataset, whose "
        "item embeddings LETTER's collaborative loss takes",
    )
    args = parser.parse_args(argv)

    # Flags without effect are errors.
    unused: list[str] = []
    if args.quantizer == EXISTING:
        unused = ["levels", "codes", "embeddings", "cf_run", *ONLY_RQ_VAE]
    elif args.quantizer != "rq-vae":
        unused = ["cf_run", *ONLY_RQ_VAE]
    for name in unused:
        if getattr(args, name) is not None:
            parser.error(f"--{name}: --quantizer {args.quantizer} does not use it")
    if args.quantizer != EXISTING and args.embeddings is None:
        parser.error(f"--quantizer {args.quantizer} needs --embeddings; make them with igd embed")
    for name in ("cf_weight", "cf_temperature"):
        if getattr(args, name) is not None and args.cf_run is None:
            parser.error(f"--{name} needs --cf_run: there are no collaborative embeddings")

    # Defaults.
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.hidden = tuple(args.hidden)
    args.log_dir = args.log_dir or args.output.with_name(f"{args.output.name}.quantizer")
    return args


def request_of(args: argparse.Namespace) -> IDRequest:
    """Return the request that the parsed flags describe."""
    return IDRequest(
        dataset=args.dataset,
        output=args.output,
        log_dir=args.log_dir,
        quantizer=args.quantizer,
        collisions=args.collisions,
        embeddings=args.embeddings,
        options=QuantizerOptions(**{name: getattr(args, name) for name in DEFAULTS}),
        cf_run=args.cf_run,
    )


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report as a table of levels and a few lines; warnings go to stderr."""
    print(
        f"{'level':8s}{'codes':>8s}{'use':>8s}{'perplexity':>12s}{'filtering':>11s}"
        f"{'purity gain':>13s}"
    )
    for level, size in enumerate(report["codebook_sizes"]):
        use = " " * 20  # the extra level has no codebook
        if level < len(report["use"]):
            use = f"{report['use'][level]:8.1%}{report['perplexity'][level]:12.1f}"
        numbers = f"{report['filtering_ratio'][level]:11.2%}{report['purity_gain'][level]:13.4f}"
        print(f"{LEVEL_LETTERS[level]:8s}{size:8d}{use}{numbers}")

    if "reconstruction_error" in report:
        error = report["reconstruction_error"]
        print(f"reconstruction error   {error:.4f} of the embeddings' variance")
    print(
        f"collision rate         {report['collision_rate_before']:.2%} before, "
        f"{report['collision_rate']:.2%} after; {report['changed_items']} of {report['items']} "
        "items changed"
    )
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: a file, a flag or an existing output folder does not fit the request.
    """
    args = parse(argv)
    report = assign_ids(request_of(args))
    if report is None:
        print(f"{args.output} is complete and was made by the same request: nothing to do")
        return 0

    print_report(report)
    print(f"dataset                {args.output}")
    print(f"logs                   {args.log_dir}")
    return 0


if __name__ == "__main__":
    distributed.run(main)

"""DeepSeek-V3's training bill (V3 table 1): 2.788M H800 hours, $5.576M, at $2 an hour.

    python -m tests.claims.bill
    python -m tests.claims.bill --tokens 30 --price 1.5     another training, another market

`hours = tokens * hours per token + extension + post-training`, and a check that the paper does not
print: the FLOPs of the published shapes over these hours are 387 TFLOP/s per GPU, 39 % of an H800's
989 in bf16. What came out: the hours and dollars of table 1.
"""

from dataclasses import dataclass

from data.io.cli import Knobs, knob, parse_flags, run_main
from data.io.portrait import si
from model import Config, flops_per_token


@dataclass
class BillConfig(Knobs):
    """What the bill is made of (V3 section 1)."""

    tokens: float = knob(14.8, "trillions of tokens of pretraining", above=0)
    per_trillion: float = knob(180, "thousands of H800 hours per trillion of tokens", above=0)
    extension: float = knob(119, "thousands of hours for the longer context", least=0)
    post_training: float = knob(5, "thousands of hours for post-training", least=0)
    price: float = knob(2, "dollars of an H800 hour", least=0)


def main(argv: list[str]) -> None:
    """Print the bill and its check."""
    bill = parse_flags(BillConfig, argv, __doc__)
    pretraining = bill.tokens * bill.per_trillion * 1e3  # H800 hours
    hours = pretraining + (bill.extension + bill.post_training) * 1e3
    flops = bill.tokens * 1e12 * flops_per_token(Config.preset("v3"), 4096)
    print(f"training bill (V3 table 1, at ${bill.price:g} per H800 hour)\n"
          f"  pretraining         {bill.tokens:g}T tokens x {bill.per_trillion:g}K hours per 1T = "
          f"{pretraining / 1e3:,.0f}K hours\n"
          f"  + extension {bill.extension:g}K + post-training {bill.post_training:g}K = {hours / 1e6:.3f}M "
          f"H800 hours = ${bill.price * hours / 1e6:.3f}M\n"
          f"  check               {si(flops)}FLOP / {pretraining / 1e6:.3f}M hours = "
          f"{flops / pretraining / 3600 / 1e12:.0f} TFLOP/s per GPU")


if __name__ == "__main__":
    run_main(main)

"""`tokenlabel` on the command line of a test: the same verbs and options, with a tiny network for each pretrained one.

Nothing is downloaded: `test_vit` with the weights in $NETWORK stands for every pretrained network, images are seen at
64 px, and an epoch is one step.
"""

import os
import sys
from pathlib import Path

from tokenlabel.cli import main

NETWORK = os.environ.get("NETWORK", "")
FEW = {
    "train": "--epochs 1 --min-epoch-steps 1 --batch-size 8 --micro-batch-size 8 --precision fp32 --data.num-workers 0 "
    "--optim.warmup-epochs 0 --optim.cooldown-epochs 0 --eval.every-epochs 1",
    "annotate": "--size 64",
    "fit-head": "--size 64",
    "inspect": "",
    "eval": "--num-workers 0",
}


def in_small(words: list[str]) -> list[str]:
    """Return the words of a command that does the same with little."""
    verb, more = words[0], FEW.get(words[0], "").split()
    for option in ("--backbone", "--teacher", "--out-of-fold"):
        if option in words and not Path(value := words[words.index(option) + 1]).exists():
            words = [*words[: words.index(option)], option, "test_vit", *words[words.index(option) + 2 :]]
            more += ["--weights", NETWORK] + ["--size", "64"] * (option == "--out-of-fold")
            assert "." in value, f"{value}: names pretrained weights by their tag"
    if verb == "train" and "--model.weights" not in words:  # a run says itself what it trained
        more += ["--model.name", "test_vit", "--model.img-size", "64", "--model.options={}"]
    if words[-2:] and "--from" in words and words[words.index("--from") + 1] == "words":
        more += ["--words", "8"]
    return [*words, *more]


if __name__ == "__main__":
    sys.exit(main(in_small(sys.argv[1:])))

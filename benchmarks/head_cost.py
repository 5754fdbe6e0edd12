"""What visual words cost: `python -m benchmarks.head_cost IMAGES --backbone NAME [--weights FILE] [--label OTHERS]`.

Prints images/s of the bare backbone and of what `fit-head --from words` does with it (interleaved, medians), seconds of
k-means, the bytes an image of stores of 1,024, 8,192 and 65,536 words, and, with LV-ViT-S, time and peak memory of a
training step over as many token classes, against 1,000. Words of the largest number are drawn from the vectors instead
of fitted, which takes hours without a GPU: the bytes of a store follow from the temperature, which is fitted.
`--label`: images to label, where they are others than the words are of.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import Settings, interleave, peak_bytes
from tokenlabel import AnnotateConfig, Head, annotate, class_targets, create_model, open_images, token_label_loss
from tokenlabel.core.batch import normalize_images
from tokenlabel.core.targets import TokenTargets
from tokenlabel.teachers import solvers
from tokenlabel.teachers.backbone import load_backbone
from tokenlabel.teachers.labelling import as_tensor, seen_batches
from tokenlabel.teachers.vectors import Vectors

CPU = torch.device("cpu")
TOPK = 5
VECTORS_PER_WORD = 4  # of the largest number of words


def main() -> None:
    """Print one line a figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_cost", description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--label", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int)
    parser.add_argument("--words", type=int, nargs="+", default=[1024, 8192, 65_536])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["speed", "stores", "step"])
    options = parser.parse_args()
    if options.only != "step":
        vectors = _vectors(options)
        if options.only != "stores":
            _speed(vectors, options.rounds)
        if options.only != "speed":
            _stores(vectors, options)
    if options.only in (None, "step"):
        _step()


def _vectors(options: argparse.Namespace) -> Vectors:
    backbone = load_backbone(options.backbone, CPU, weights=options.weights, size=options.size)
    source = open_images(options.images)
    return Vectors(backbone=backbone, source=source)


def _speed(vectors: Vectors, rounds: int) -> None:
    input, network, count = vectors.backbone.input, vectors.backbone.network.backbone, len(vectors.source)

    def bare() -> None:
        batches = seen_batches(vectors.source, input, range(count), batch_size=64, num_workers=2, failures=[])
        for seen in batches:
            images = normalize_images(as_tensor(seen, CPU), mean=input.mean, std=input.std)
            with torch.inference_mode():
                network(images.contiguous(memory_format=torch.channels_last))

    seconds: dict[str, list[float]] = {"bare backbone": [], "its vectors": []}
    for _ in range(rounds):
        for name, function in (("bare backbone", bare), ("its vectors", lambda: vectors.locations(8 * count))):
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name}: {count / statistics.median(values):.1f} images/s", flush=True)
    print(f"peak memory so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)


def _stores(vectors: Vectors, options: argparse.Namespace) -> None:
    sample, _ = vectors.locations(VECTORS_PER_WORD * max(options.words))
    for num_words in options.words:
        solvers.NUM_ROUNDS = 8 if num_words < 65_536 else 0
        started = time.perf_counter()
        found = solvers.fit_words(sample, min(num_words, len(sample)), topk=TOPK, seed=0)
        seconds = time.perf_counter() - started
        head = Head(
            found.matrix,
            kind="words",
            center=found.center,
            scale=found.scale,
            normalised=True,
            backbone=vectors.backbone.description,
        )
        with tempfile.TemporaryDirectory() as folder:
            head.save(Path(folder) / "head.safetensors")
            config = AnnotateConfig(teacher=str(Path(folder) / "head.safetensors"), weights=options.weights, topk=TOPK)
            done = annotate(options.label or options.images, Path(folder) / "labels", config)
            size = sum(path.stat().st_size for path in (Path(folder) / "labels").glob("*") if path.suffix != ".json")
        print(
            f"{len(found.matrix):,} words of {len(sample):,} vectors ({solvers.NUM_ROUNDS} rounds, {seconds:.0f} s): "
            f"{size / done.num_labelled:.0f} bytes an image, {done.images_per_s:.1f} images/s labelled, "
            f"scale {found.scale:.1f}",
            flush=True,
        )


def _step() -> None:
    """Forward, fused loss and backward of LV-ViT-S at 224 px, 4 images, about as many token classes as words."""
    settings = Settings(CPU)
    images, classes = torch.randn(4, 3, 224, 224), torch.arange(4)
    ways = {}
    for count in (1000, 8192, 65_536):
        model = create_model("lvvit_s", num_classes=1000, img_size=224, num_token_classes=count)
        excess = torch.rand(4, 196, 60)
        tokens = TokenTargets(
            torch.randint(count, (4, 60)),
            0.9 * excess / excess.sum(dim=2, keepdim=True),
            torch.full((4, 196), 0.1 / count),
            torch.ones(4, 196),
        )

        def step(model=model, tokens=tokens) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_label_loss(model(images), class_targets(classes), tokens, beta=0.5)
            loss.total.backward()
            model.zero_grad(set_to_none=True)

        ways[f"{count:,} token classes"] = step
    seconds = interleave(ways, settings, rounds=5)
    for name, values in seconds.items():
        peak = peak_bytes(ways[name], settings) / 2**20
        print(
            f"{name}: {statistics.median(values):.2f} s a step of 4 images, {peak:.0f} MiB beside weights", flush=True
        )


if __name__ == "__main__":
    main()

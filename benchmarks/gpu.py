"""All that has to be known of a GPU, most important first, each part a process of its own with a time limit.

`benchmarks/gpu.sh` runs it where nothing can be downloaded. Every part's rows are printed and appended to `--out` as
soon as the part ends; one that hangs, fails or runs out of memory costs its own rows only. `--device cpu --tiny` runs
the same parts in small.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import annotate_speed, data_speed, model_speed, segment_speed, token_head
from benchmarks.__main__ import machine, table
from benchmarks.measure import Row, Settings, interleave, peak_bytes, ratios
from benchmarks.step_cost import Case, step_rows

# The cards' published peaks of bf16 products without sparsity, in Tflop/s: what model FLOP utilisation is a share of.
PEAKS = {"H100": 989, "H200": 989, "A100": 312}


@dataclass(frozen=True)
class Part:
    """One question to a GPU. `limit_s`: seconds after which it is ended."""

    name: str
    limit_s: int
    measure: Callable[[Settings], list[Row]]


def step(settings: Settings) -> list[Row]:
    """LV-ViT-S as one writes it down from the paper, ours, and ours compiled: images/s, peak memory, utilisation."""
    name, num_images = ("lvvit_t", 2) if settings.quick else ("lvvit_s", 256)
    rows = model_speed.compare(name, "bf16", num_images, settings)
    if settings.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(settings.device) / 2**30
        rows.append(Row("most memory of these steps", [memory], "GiB"))
        card = torch.cuda.get_device_name(settings.device)
        rate = next((row.median for row in rows if row.name.endswith("matrix products alone")), 0.0)
        for mark, peak in PEAKS.items():
            if mark in card:
                rows.append(Row(f"matrix products, of the {mark}'s {peak} Tflop/s", [100 * rate / peak], "%"))
    return rows


def tokens(settings: Settings) -> list[Row]:
    """Return what token labels add to the engine's own step."""
    case = Case("lvvit_t", 10, "bf16", 2) if settings.quick else Case("lvvit_s", 1000, "bf16", 256)
    return step_rows(case, settings)


def head(settings: Settings) -> list[Row]:
    """Compare the fused head with one whose logits exist, in time and peak memory."""
    rows, num_images = [], 1 if settings.quick else 64
    for num_classes in (10, 500) if settings.quick else (1000, 21_841, 65_536):
        ways = token_head.make_ways(num_images, num_classes, "bfloat16", settings)
        seconds = interleave(ways, settings, rounds=3 if settings.quick else 7)
        title = f"{num_classes:,} classes, bf16"
        rows += [Row(f"{title}: {way}", [1e3 * s for s in values], "ms") for way, values in seconds.items()]
        rows.append(Row(f"{title}: unfused / fused", ratios(seconds["unfused"], seconds["fused"]), "x"))
        for way, function in ways.items():
            rows.append(Row(f"{title}: {way}, peak", [peak_bytes(function, settings) / 2**20], "MiB"))
    return rows


def annotate(settings: Settings) -> list[Row]:
    """Compare annotating with the bare forward pass of a ViT and of a convolutional teacher."""
    if settings.quick:
        return annotate_speed.rows_of("resnet10t", 64, 2, settings)
    vit = annotate_speed.rows_of("vit_large_patch16_224", 576, 64, settings, img_size=576)
    return [*vit, *annotate_speed.rows_of("dm_nfnet_f6", 576, 64, settings)]


def loader(settings: Settings) -> list[Row]:
    """Compare our loader with timm's, up to normalised batches on the device."""
    num_images = data_speed.BATCH_SIZE * (1 if settings.quick else 16)
    return data_speed.against_timm("crop + flip", None, num_images, settings)


def segment(settings: Settings) -> list[Row]:
    """Time training LV-ViT-S + UPerNet on 16 crops of 512 x 512."""
    name, batch_size, side_px = ("lvvit_t", 2, 64) if settings.quick else ("lvvit_s", 16, 512)
    return segment_speed.rows_of(name, batch_size, side_px, settings)


def sharded(settings: Settings) -> list[Row]:
    """Train a few steps under FSDP2 in one process, and the same without: images/s, and how far their losses part."""
    rows, losses = [], {}
    options = ("lvvit_s", 64, 224) if not settings.quick else ("lvvit_t", 4, 32)
    name, batch_size, side_px = options
    with tempfile.TemporaryDirectory() as folder:
        command = (
            *("train", "--recipe", "lvvit_s", "--model.name", name, "--model.img_size", side_px),
            *("--data.train", _images(Path(folder), side_px), "--loss.beta", "0", "--batch_size", batch_size),
            *("--num_steps", "8", "--data.num_workers", "0", "--model.options={}", "--precision", "bf16"),
            *("--device", settings.device),
        )
        for title, more in (("one process", ()), ("FSDP2, one process", ("--sharded", "true"))):
            run = Path(folder) / title
            _tokenlabel(*command, *more, "--out", run, processes=1 if more else 0)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            trained = [line for line in lines if line["kind"] == "train"]
            losses[title] = [line["loss"] for line in trained]
            rows.append(Row(f"{name}, {title}", [line["images_per_s"] for line in trained], "images/s"))
    first, second = losses.values()
    rows.append(Row("losses part by at most", [max(abs(a - b) for a, b in zip(first, second, strict=True))], ""))
    return rows


def resume(settings: Settings) -> list[Row]:
    """Train two epochs, and the second one again from the first one's checkpoint: are the weights the same bits?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = (
            *("train", "--recipe", "demo_token_labels", "--data.train", _images(folder, 48)),
            *("--loss.beta", "0", "--epochs", "2", "--batch_size", "50", "--optim.warmup_epochs", "0"),
            *("--checkpoint.every_epochs", "1", "--checkpoint.keep", "2", "--data.num_workers", "0"),
            *("--device", settings.device),
        )
        _tokenlabel(*command, "--out", folder / "whole")
        first, second = sorted((folder / "whole" / "checkpoints").iterdir())
        shutil.copytree(folder / "whole", folder / "resumed")
        shutil.rmtree(again := folder / "resumed" / "checkpoints" / second.name)
        _tokenlabel(*command, "--out", folder / "resumed")
        whole, resumed, before = (load_file(of / "model.safetensors") for of in (second, again, first))
        same = all(torch.equal(whole[key], resumed[key]) for key in whole)
        assert not all(torch.equal(whole[key], before[key]) for key in whole)  # the second epoch moved them
    return [Row("resumed and unbroken weights are the same bits", [float(same)], "", "1")]


def _images(folder: Path, side_px: int) -> Path:
    """Write 100 images of noise in two class folders; return their root."""
    rng = np.random.default_rng(0)
    for i in range(100):
        path = folder / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)).save(path)
    return folder / "images"


def _tokenlabel(*arguments: object, processes: int = 0) -> None:
    """Run a command of tokenlabel, under torchrun if `processes` says how many."""
    under = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    subprocess.run([sys.executable, *under, "-m", "tokenlabel", *map(str, arguments)], check=True)


PARTS = (
    Part("step", 130, step),
    Part("tokens", 60, tokens),
    Part("head", 60, head),
    Part("annotate", 100, annotate),
    Part("loader", 60, loader),
    Part("segment", 60, segment),
    Part("sharded", 80, sharded),
    Part("resume", 60, resume),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the command line names, all by default; return how many gave no rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="small models, few images: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append each part's rows as a line of JSON")
    options = parser.parse_args(arguments)
    if unknown := {*options.parts} - {*names}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    settings, failed = Settings(torch.device(options.device), quick=options.tiny), 0
    for part in PARTS:
        if not options.parts or part.name in options.parts:
            failed += not _run(part, settings, options.out)
    return failed


def _run(part: Part, settings: Settings, out: Path | None) -> bool:
    """Run a part in a child, which alone opens the GPU; say whether it gave its rows in time."""
    started = time.perf_counter()
    child = multiprocessing.get_context("fork").Process(target=_measure, args=(part, settings, out))
    child.start()
    limit_s = part.limit_s * (5 if settings.quick else 1)  # a CPU may have other work
    child.join(limit_s)
    if late := child.is_alive():
        assert child.pid is not None
        os.killpg(child.pid, signal.SIGKILL)  # with its workers
        child.join()
    ended = f"ended after {limit_s} s" if late else "failed" if child.exitcode else "done"
    print(f"{part.name}: {ended}, {time.perf_counter() - started:.0f} s\n", flush=True)
    return child.exitcode == 0


def _measure(part: Part, settings: Settings, out: Path | None) -> None:
    os.setsid()
    try:
        rows = part.measure(settings)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    print(table(part.name, rows), flush=True)
    if out:
        found = {row.name: [row.median, row.spread, row.unit] for row in rows}
        with out.open("a") as file:
            file.write(json.dumps({"part": part.name, "machine": machine(settings.device), "rows": found}) + "\n")


if __name__ == "__main__":
    sys.exit(main())

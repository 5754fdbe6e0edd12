"""`tokenlabel segment train|eval|predict`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenlabel.runtime.arguments import Parser, add_device, add_figures, device_of, parse, print_figures
from tokenlabel.runtime.coercion import COUNT, check_numbers
from tokenlabel.runtime.errors import ModelError, refuse
from tokenlabel.runtime.process import listed, say

if TYPE_CHECKING:
    from argparse import Namespace

    from tokenlabel.models.load import LoadedModel

USAGE = """usage: tokenlabel segment train|eval|predict ...

Semantic segmentation: FCN and UPerNet heads on any backbone, see docs/segmentation.md.

  train    train a segmentation model by a recipe
  eval     mIoU, mean accuracy and pixel accuracy of a run or of a published file
  predict  masks and overlays of images, as PNG, or soft labels in a store

`tokenlabel segment train --help` explains each."""


def run_segment(arguments: list[str]) -> int:
    """Run one of the commands; return its exit status."""
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "eval": _evaluate, "predict": _predict}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] not in commands:
        raise ValueError(f"no command {arguments[0]!r}; known: {', '.join(commands)}")
    return commands[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> int:
    from tokenlabel.segmentation.recipe import SegmentRecipe
    from tokenlabel.training.command import run_train

    def _task() -> tuple[Callable[..., Any], Callable[..., Any]]:
        from tokenlabel.segmentation.task import build, train_segmentation

        return train_segmentation, build

    description = "Train a segmentation model by a recipe. The same command continues a run that was stopped."
    return run_train(Parser("segment train", description), arguments, SegmentRecipe, _task)


def _evaluate(arguments: list[str]) -> int:
    parser = Parser(
        "segment eval",
        "Evaluate a run (its averaged weights if it has them) or a published file on images with masks. "
        "Under torchrun the processes share the images.",
    )
    _add_network(parser)
    add_figures(parser)
    parser.add_argument("--split", help="split of the data set; by default the one that the recipe evaluates on")
    parser.add_argument("--images", help="any folder of images, in place of the recipe's")
    parser.add_argument("--masks", help="their masks, with the recipe's values, or COCO's file about them (.json)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    options = parse(parser, arguments)
    check_numbers(options, "--", num_workers=COUNT)
    both = "--split names a part of the data set, --images and --masks other folders; leave one out"
    refuse({both: options.split and (options.images or options.masks)})

    from tqdm import tqdm

    from tokenlabel.evaluation.options import as_text
    from tokenlabel.runtime.distributed import autocast, joined_ranks
    from tokenlabel.segmentation.inference import evaluate_segmentation, segmenter_of
    from tokenlabel.segmentation.layouts import other_pairs

    device, workers = device_of(options.device), options.num_workers
    with joined_ranks(device) as ranks:
        trained = _network(options)
        recipe, names, precision = trained.recipe, trained.class_names, autocast(device, trained.recipe.precision)
        pairs = other_pairs(recipe.data, names, split=options.split, images=options.images, masks=options.masks)
        with tqdm(total=len(pairs), desc="eval", unit="img", disable=None if ranks.is_first else True) as bar:
            how = {"autocast": precision, "num_workers": workers, "on_sample": lambda *_: bar.update(ranks.world_size)}
            figures = evaluate_segmentation(segmenter_of(trained, device), pairs, ranks=ranks, **how)
    if absent := figures["absent_classes"]:
        counted = f"{sum(iou is not None for iou in figures['class_iou'].values()):,}"
        no_mask = f"no mask holds {len(absent):,} of {len(names):,} classes ({listed(absent)})"
        say(f"{no_mask}: mIoU is the mean over {counted}")
    if ranks.is_first:
        step = {} if trained.step is None else {"step": trained.step}
        print_figures(options, {"network": trained.name, **step, **figures}, as_text)
    return 0


def _predict(arguments: list[str]) -> int:
    parser = Parser(
        "segment predict",
        "Predict the class of every pixel: masks with a palette and overlays, or soft maps into a label store.",
    )
    _add_network(parser)
    add_device(parser)
    parser.add_argument("images", type=Path, nargs="+", help="image files or folders of them")
    parser.add_argument("--out", type=Path, help="folder for masks/, overlays/ and classes.json")
    parser.add_argument("--store", type=Path, help="label store for soft predictions, on the grid of the model's head")
    options = parse(parser, arguments)
    (first, *others), out = options.images, options.out
    is_folder, is_inside = not others and first.is_dir(), out and out.resolve().is_relative_to(first.resolve())
    refuse(
        {
            "name --out for masks and overlays, --store for soft predictions, or both": not (out or options.store),
            "--store takes one folder of images: keys of labels are relative to it": options.store and not is_folder,
            f"--out {out} lies among the images, so that --store would label the pictures in it, too; name a folder "
            "elsewhere": options.store and is_inside,
        }
    )

    from tokenlabel.models.weights import fingerprint
    from tokenlabel.runtime.distributed import autocast
    from tokenlabel.segmentation.inference import segmenter_of
    from tokenlabel.segmentation.layouts import classes_of
    from tokenlabel.segmentation.predictions import check_out, predict_files, store_predictions

    device, trained = device_of(options.device), _network(options)
    segmenter, classes = segmenter_of(trained, device), classes_of(trained.recipe.data, trained.class_names)
    if out:
        check_out(out, classes)
    with autocast(device, trained.recipe.precision):
        if options.store:  # first: it refuses a store of other labels before the work
            names, teacher = trained.class_names, {"name": trained.name, "weights": fingerprint(trained.model)}
            num_new = store_predictions(
                segmenter, first, options.store, class_names=names, teacher=teacher, device=device
            )
            print(f"{options.store}: {num_new:,} images labelled")
        if out:
            num_images = predict_files(segmenter, options.images, out, classes=classes, device=device)
            print(f"{out}: {num_images:,} images")
    return 0


def _add_network(parser: Parser) -> None:
    """Add the options for a model and for how it sees images."""
    parser.add_argument(
        "network", type=Path, help="run folder, one of its checkpoint folders, or, with --recipe, a published file"
    )
    parser.add_argument("--recipe", help="recipe of a published file, by name or as a file")
    parser.add_argument("--root", help="folder of the data set, in place of the recipe's")
    parser.add_argument("--mode", choices=["slide", "whole"], help="sliding windows or the whole image at once")
    parser.add_argument("--stride", type=int, help="distance of windows in pixels")
    parser.add_argument("--short-side", type=int, help="resize images to this shorter side; 0 keeps their size")
    parser.add_argument(
        "--scales", type=float, nargs="+", help="average over these sizes, such as .5 .75 1 1.25 1.5 1.75"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")


def _network(options: Namespace) -> LoadedModel:
    """Return the model that the options name; its recipe has the options' values."""
    from tokenlabel.segmentation.recipe import Layout, SegmentRecipe
    from tokenlabel.training.checkpoint import load_run

    if options.recipe is None:
        loaded = load_run(options.network, SegmentRecipe)
    else:
        loaded = _load_by_recipe(options.network, options.recipe, root=options.root)
    recipe: SegmentRecipe = loaded.recipe
    has_root, is_folders = options.root is not None, recipe.data.layout is Layout.FOLDERS
    has_stride, is_whole = options.stride is not None, (options.mode or recipe.eval.mode) == "whole"
    refuse(
        {
            "--root is for known layouts; name folders with --images and --masks": has_root and is_folders,
            "--stride is the distance of windows, and with mode whole there are none; leave one out": has_stride
            and is_whole,
        }
    )
    if has_root:
        recipe = replace(recipe, data=replace(recipe.data, root=options.root))
    changes: dict[str, Any] = {
        "mode": options.mode,
        "stride_px": (options.stride, options.stride) if has_stride else None,
        "scales": options.scales and tuple(options.scales),
        "flip": options.flip or None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.short_side is not None:
        changes["short_side_px"] = options.short_side or None  # 0: their own size
    try:
        return replace(loaded, recipe=replace(recipe, eval=replace(recipe.eval, **changes)))
    except ValueError as error:  # it names fields of the recipe: eval.stride_px is --stride here
        text = re.sub(r"^eval\.(\w+?)(_px)?(?= must)", lambda field: f"--{field[1].replace('_', '-')}", str(error))
        raise ValueError(text) from error


def _load_by_recipe(path: Path, name: str, *, root: str | None) -> LoadedModel:
    """Return the model of a published file and its recipe (by name, or a file), with the classes of its data.

    Raises ModelError for a file that does not fill all of the model, such as a backbone.
    """
    from tokenlabel.data.classes import difference
    from tokenlabel.models.load import LoadedModel
    from tokenlabel.models.segmentation import create_segmentation_model, load_segmentation_weights
    from tokenlabel.models.weight_files import read_class_names
    from tokenlabel.runtime.configuration import config_from_dict
    from tokenlabel.segmentation.layouts import classes_of
    from tokenlabel.segmentation.recipe import SegmentRecipe
    from tokenlabel.training.recipe import recipe_content

    nested = recipe_content(name, SegmentRecipe)
    data = nested.setdefault("data", {})
    if root or data.get("layout") != "folders":
        data["root"] = root or data.get("root", ".")
    recipe = config_from_dict(nested, SegmentRecipe, name=name)
    names = classes_of(recipe.data, list(recipe.data.class_names)).names
    model = create_segmentation_model(recipe.model, num_classes=len(names))
    average = recipe.model.average
    if missing := sorted(load_segmentation_weights(model, path, class_names=names, average=average)):
        theirs = read_class_names(path)
        unlike = difference(theirs, names, count=len(theirs), them="the file") if theirs else "names no classes"
        raise ModelError(
            f"{path}: is no whole model of {name}: it has nothing for {listed(missing)}, or is for other classes than "
            f"the recipe's ({unlike}); train one from it (tokenlabel segment train --model.weights)"
        )
    return LoadedModel(
        name=str(path),
        model=model.eval(),
        class_names=tuple(names),
        img_size=recipe.model.img_size,
        precision=recipe.precision,
        recipe=recipe,
    )

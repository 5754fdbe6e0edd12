"""The command line: `tokenlabel VERB ...`. Each verb parses its arguments and calls one function.

Modules are imported by the verb that needs them, so that `tokenlabel --help` answers at once.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenlabel import __version__
from tokenlabel.runtime.arguments import Parser, add_device, add_figures, device_of, parse, parse_config, print_figures
from tokenlabel.runtime.coercion import NATURAL, check_numbers
from tokenlabel.runtime.errors import near_names, refuse
from tokenlabel.runtime.process import USAGE_ERROR, is_main_process, printable, run_command, say, with_open_streams

if TYPE_CHECKING:
    from tokenlabel.data.images import ImageSource
    from tokenlabel.labels.store import LabelStore

IMAGES_HELP = (
    "a folder of images, or of one folder a class; .tar files (WebDataset) or a folder of them; a list file; "
    "hf-dataset:NAME; or URLs of these"
)
IGNORE_INDEX_HELP = "the id of pixels without a class in --masks; by default 255, with more than 255 classes 65535"

OVERVIEW = """usage: tokenlabel VERB ...

Train vision models with token labeling: one soft label for every output token.

{verbs}

`tokenlabel VERB --help` explains a verb. TOKENLABEL_TRACEBACK=1 shows where an error came from."""

_Function = Callable[[Parser, list[str]], int | None]

VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {}
"""What each verb runs, given its arguments, and what `tokenlabel --help` says of it."""


def verb(name: str, summary: str) -> Callable[[_Function], _Function]:
    """Make a verb of a function of a parser and arguments, whose docstring is what `--help` begins with."""

    def _register(function: _Function) -> _Function:
        description = " ".join((function.__doc__ or "").split())
        VERBS[name] = (lambda arguments: function(Parser(name, description), arguments) or 0), summary
        return function

    return _register


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, 2 for input that cannot be used, 128 + signal if stopped."""
    return with_open_streams(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items())
        print(OVERVIEW.format(verbs=verbs))
        return 0
    if arguments[0] == "--version":
        print(f"tokenlabel {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        print(f"tokenlabel: no verb {name!r}{near_names(name, [*VERBS])}", file=sys.stderr)
        return USAGE_ERROR
    return run_command(f"tokenlabel {name}", VERBS[name][0], rest)


@verb("demo", "every stage on data that ships with a dependency: start here")
def demo(parser: Parser, arguments: list[str]) -> int:
    """Train with token labels on scenes of real handwritten digits; nothing is downloaded."""
    parser.add_argument("--out", type=Path, help="folder of all results: runs/demo, runs/demo-fast with --fast")
    parser.add_argument("--fast", action="store_true", help="all stages in 90 seconds: fewer images and steps")
    options = parse(parser, arguments)
    from tokenlabel.demo import FAST, FULL, run_demo

    out = options.out or Path("runs/demo-fast" if options.fast else "runs/demo")
    return run_demo(out, FAST if options.fast else FULL, main)


@verb("index", "what is where in tar files, for data sets too large for folders")
def index(parser: Parser, arguments: list[str]) -> None:
    """Write an index of a folder of tar files, so that it opens at once from then on."""
    from tokenlabel.data.tars import write_index

    parser.add_argument("images", type=Path, help="folder of .tar files; the index is written beside them")
    options = parse(parser, arguments)
    print(write_index(options.images))


@verb("annotate", "a teacher writes a dense score map for every image")
def annotate(parser: Parser, arguments: list[str]) -> int:
    """Run a teacher on every image once and store its class scores for every location."""
    from tokenlabel.teachers.options import AnnotateConfig

    parser.add_argument("images", type=Path, help=IMAGES_HELP)
    parser.add_argument("store", type=Path, help="folder of the labels; what is there already is kept")
    add_device(parser)
    options, config = parse_config(parser, arguments, AnnotateConfig)
    from tokenlabel.teachers.annotation import annotate as write_labels

    done = write_labels(options.images, options.store, config, device=device_of(options.device))
    if is_main_process():
        anew = f" ({done.num_anew:,} anew)" if done.num_anew else ""
        size = "" if done.bytes_per_image is None else f", {done.bytes_per_image:,.0f} bytes an image"
        print(
            f"{options.store}: {done.num_labelled:,} images labelled{anew}, {done.num_present:,} had been, "
            f"{len(done.failures):,} failed; {done.images_per_s:,.0f} images/s{size}"
        )
        _print_some([failure.reason for failure in done.failures])
    return USAGE_ERROR if done.failures and not done.num_labelled + done.num_present else 0


@verb("fit-head", "make a teacher of any backbone: visual words, or a head from labels, masks or texts")
def fit_head(parser: Parser, arguments: list[str]) -> int | None:
    """Fit a head on any backbone's features and write it to a small file, which `annotate --teacher` takes."""
    from tokenlabel.teachers.options import FitConfig

    parser.add_argument("images", type=Path, help=IMAGES_HELP)
    parser.add_argument("head", type=Path, help="file of the head, HEAD.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace a head that is there")
    add_device(parser)
    options, config = parse_config(parser, arguments, FitConfig)
    from tokenlabel.teachers import fitting

    try:
        more = {"device": device_of(options.device), "overwrite": options.overwrite}
        head = fitting.fit_head(options.images, options.head, config, **more)
    except KeyboardInterrupt:
        print("\ntokenlabel fit-head: stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.head}: {head.extra_repr()}")
    return None


@verb("inspect", "what is in a label store")
def inspect(parser: Parser, arguments: list[str]) -> None:
    """Describe a label store: what is in it, how certain its teacher was, and which labels look wrong."""
    from tokenlabel.labels.inspection import InspectConfig, inspect_store
    from tokenlabel.labels.presentation import as_text, write_pictures
    from tokenlabel.labels.store import LabelStore

    _add_inspect_arguments(parser)
    options, config = parse_config(parser, arguments, InspectConfig)
    check_numbers(options, "--", size=NATURAL)
    no_images, no_masks, no_folds = not options.images, not options.masks, not options.out_of_fold
    refuse(
        {
            "--pictures needs the images that the labels belong to; name them with --images": no_images
            and options.pictures,
            "--ignore-index is an id in masks; give --masks, or leave it out": no_masks
            and options.ignore_index is not None,
            "--out-of-fold needs the images and their classes; name them with --images": no_images
            and options.out_of_fold,
            "--weights, --size and --probabilities are about --out-of-fold BACKBONE; leave them out": no_folds
            and (options.weights or options.size or options.probabilities),
        }
    )
    store, source = LabelStore(*options.store, duplicates=options.duplicates), None
    if options.images:
        from tokenlabel.data.sources import open_aloud

        source = open_aloud(options.images)
    figures = inspect_store(store, config, source=source).as_dict()
    figures |= _judge(store, source, options, config.num_suspects)
    if source and options.pictures:
        write_pictures(store, source, options.pictures)
        say(f"{options.pictures}: maps over their images")
    print_figures(options, figures, as_text)


def _add_inspect_arguments(parser: Parser) -> None:
    from tokenlabel.drawing.page import PAGE

    parser.add_argument("store", type=Path, nargs="+", help="folders of labels, read as one")
    parser.add_argument("--images", type=Path, help=f"the images, for their classes and changes of them: {IMAGES_HELP}")
    parser.add_argument("--pictures", type=Path, help="write an HTML page of maps over images to this file")
    parser.add_argument("--masks", type=Path, help="true dense labels (PNG class ids): how often the maps are right")
    parser.add_argument("--ignore-index", type=int, help=IGNORE_INDEX_HELP)
    text = "find wrong classes by heads on this network, each fitted without the images that it judges"
    parser.add_argument("--out-of-fold", metavar="BACKBONE", help=text)
    parser.add_argument("--weights", help="of --out-of-fold: checkpoint file of the network")
    parser.add_argument("--size", type=int, help="of --out-of-fold: images are seen at size x size pixels")
    text = "of --out-of-fold: write pred_probs, labels, keys and class_names to this .npz, as cleanlab takes them"
    parser.add_argument("--probabilities", type=Path, help=text)
    parser.written |= {"pictures": PAGE, "probabilities": ("such archive", rb"PK\x03\x04.{26}pred_probs\.npy")}
    _add_duplicates(parser)
    add_figures(parser)


def _judge(store: LabelStore, source: ImageSource | None, options: Namespace, num_suspects: int) -> dict[str, Any]:
    """Return the agreement with --masks, and suspects by heads --out-of-fold."""
    figures: dict[str, Any] = {}
    if options.masks:
        from tokenlabel.evaluation.masks import mask_agreement

        ignore = options.ignore_index
        figures["mask_agreement"] = mask_agreement(store, options.masks, source=source, ignore_index=ignore)
    if source and options.out_of_fold:
        from tokenlabel.teachers.folds import predict_out_of_fold
        from tokenlabel.teachers.options import FitConfig

        config = FitConfig(backbone=options.out_of_fold, from_="labels", weights=options.weights, size=options.size)
        found = predict_out_of_fold(source, config, device=device_of(options.device))
        figures["out_of_fold"] = found.figures(num_suspects)
        if options.probabilities:
            found.save(options.probabilities)
    return figures


@verb("import-labels", "the label files published in 2021, into a store")
def import_labels(parser: Parser, arguments: list[str]) -> int:
    """Put the label files published in 2021 into a store, for images that you have."""
    from tokenlabel.labels.options import ImportConfig

    parser.add_argument("files", type=Path, help="folder of class folders of .pt files")
    parser.add_argument("store", type=Path, help="folder of the labels; what is there already is kept")
    parser.add_argument("--images", type=Path, required=True, help=IMAGES_HELP)
    options, config = parse_config(parser, arguments, ImportConfig)
    from tokenlabel.labels import published

    done = published.import_labels(options.files, options.store, options.images, config)
    counts = f"{done.num_imported:,} labels imported, {done.num_present:,} had been, {len(done.failures):,} failed"
    print(f"{options.store}: {counts}")
    _print_some([failure.reason for failure in done.failures])
    return USAGE_ERROR if done.failures and not done.num_imported + done.num_present else 0


@verb("merge", "several stores into one")
def merge(parser: Parser, arguments: list[str]) -> None:
    """Copy the labels of several stores into one with few files, each record checked."""
    from tokenlabel.labels.encoding import Encoding
    from tokenlabel.labels.writer import merge_stores

    parser.add_argument("stores", type=Path, nargs="+", help="folders of labels, then the folder to write")
    parser.add_argument("--encoding", choices=[*map(str, Encoding)], help="write records anew, encoded so")
    parser.add_argument("--tolerance", type=float, help="write records anew, compact, as annotate does with it")
    _add_duplicates(parser)
    options = parse(parser, arguments)
    *folders, output = options.stores
    if not folders:
        raise ValueError("merge takes at least one store to read and, as the last, the folder to write")
    more = {"tolerance": options.tolerance, "duplicates": options.duplicates}
    merged = merge_stores(folders, output, encoding=options.encoding and Encoding(options.encoding), **more)
    print(f"{output}: {len(merged):,} labels")


def _add_duplicates(parser: Parser) -> None:
    text = "what to do with images that several files label differently: take the first file by name, or refuse"
    parser.add_argument("--duplicates", choices=["first", "refuse"], default="first", help=text)


@verb("train", "train a model by a recipe, with token labels or without")
def train(parser: Parser, arguments: list[str]) -> int:
    """Train a model by a recipe. The same command continues a run that was stopped."""
    from tokenlabel.training.command import run_train
    from tokenlabel.training.recipe import Recipe

    def _task() -> tuple[Callable[..., Any], Callable[..., Any]]:
        from tokenlabel.classification import task

        return task.train, task.build

    return run_train(parser, arguments, Recipe, _task)


@verb("eval", "accuracy of a run or a model, and of its tokens where masks are known")
def evaluate(parser: Parser, arguments: list[str]) -> None:
    """Evaluate a run (its averaged weights if it has some) or a model by its name; torchrun divides the images."""
    from tokenlabel.evaluation.options import EvalOptions, as_text

    parser.add_argument("network", help="run folder, one checkpoint folder of it, or the name of a model")
    add_figures(parser)
    options, config = parse_config(parser, arguments, EvalOptions)
    from tokenlabel.evaluation.assessment import assess

    figures = assess(options.network, config, device=device_of(options.device))
    if is_main_process():
        print_figures(options, figures, as_text)


@verb("segment", "train, eval or predict: a class for every pixel, from any backbone")
def segment(_: Parser, arguments: list[str]) -> int:
    """Train, evaluate or use a segmentation model."""
    from tokenlabel.segmentation.commands import run_segment

    return run_segment(arguments)


@verb("export", "a trained classifier as safetensors, ONNX, or a folder for timm and the hub")
def export(parser: Parser, arguments: list[str]) -> None:
    """Write the model of a classifier's run as .safetensors, .onnx, or a folder that timm and the hub take."""
    parser.add_argument("run", type=Path, help="run folder of a classifier, or one checkpoint folder of it")
    parser.add_argument("out", type=Path, help="NAME.safetensors, NAME.onnx, or a folder")
    parser.add_argument("--inference", choices=["class", "tokens", "combined"], help="ONNX: how logits come about")
    parser.add_argument("--dense", action="store_true", help="ONNX: the logits of every token, too")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parse(parser, arguments)
    from tokenlabel.core.config import Inference
    from tokenlabel.training.export import export_run

    more = {"dense": options.dense, "overwrite": options.overwrite}
    export_run(options.run, options.out, inference=options.inference and Inference(options.inference), **more)
    print(options.out)


@verb("push", "a classifier's run, labels or a head to the Hugging Face hub, with a card")
def push(parser: Parser, arguments: list[str]) -> None:
    """Upload a classifier's run, labels or a head to the Hugging Face hub with a card; hf://USER/NAME reads it."""
    parser.add_argument("thing", type=Path, help="run folder of a classifier, folder of labels, or HEAD.safetensors")
    parser.add_argument("repo", help="USER/NAME")
    parser.add_argument("--licence", "--license", help="such as apache-2.0; by default the teachers', if it is known")
    parser.add_argument("--public", action="store_true", help="let everybody see it; else a new one is private")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write what would be sent to this folder")
    options = parse(parser, arguments)
    from tokenlabel.push import push as push_to_hub

    more = {"licence": options.licence, "public": options.public, "folder": options.dry_run}
    name = push_to_hub(options.thing, options.repo, **more)
    print(options.dry_run or name)


@verb("report", "one HTML file with the curves, tables and pictures of runs")
def report(parser: Parser, arguments: list[str]) -> None:
    """Write one self-contained HTML file about one or more runs."""
    parser.add_argument("runs", type=Path, nargs="+", help="run folders on this machine")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the file to write")
    from tokenlabel.drawing.page import PAGE

    parser.written["output"] = PAGE
    options = parse(parser, arguments)
    from tokenlabel.report import write_report

    write_report(options.runs, options.output)
    print(options.output)


def _print_some(reasons: list[str]) -> None:
    shown = reasons[:10]
    print("".join(f"  {printable(reason)}\n" for reason in shown), end="")
    if len(reasons) > len(shown):
        print(f"  ... and {len(reasons) - len(shown):,} more; the store's manifest lists all")

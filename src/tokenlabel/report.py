"""`tokenlabel report`: compare run folders in one self-contained HTML file.

It reads only files of the run folders (recipe.yaml, metrics.jsonl, eval.json, answers.npz, pictures/), no images, no
label stores, and imports no torch: so it works on copied folders, during training, and without the data.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from tokenlabel.data.class_names import with_words
from tokenlabel.drawing.page import Page, caption, check_output, line_chart, run_legend, shortened, table
from tokenlabel.drawing.pictures import PICTURES_FOLDER, Album, read_album
from tokenlabel.evaluation.answers import Answers, read_answers
from tokenlabel.runtime.configuration import flattened, read_yaml
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import listed
from tokenlabel.runtime.runlog import RECIPE_FILE, read_metrics
from tokenlabel.runtime.urls import as_url, without_secrets

NUM_CLASSES, NUM_DISAGREEMENTS = 20, 20

# Titles and formats of figures; others have their own names.
COLUMNS = {
    "top1": ("top-1", "{:.1%}"),
    "top5": ("top-5", "{:.1%}"),
    "loss": ("loss", "{:.3f}"),
    "ece": ("ECE", "{:.1%}"),
    "token_accuracy": ("tokens right", "{:.1%}"),
    "token_miou": ("tokens' mIoU", "{:.1%}"),
    "teacher_accuracy": ("tokens as the teacher", "{:.1%}"),
    "teacher_miou": ("as the teacher, mIoU", "{:.1%}"),
    "knn": ("nearest neighbours", "{:.1%}"),
    "image_probe": ("linear probe", "{:.1%}"),
    "miou": ("mIoU", "{:.1%}"),
    "mean_accuracy": ("mean accuracy", "{:.1%}"),
    "pixel_accuracy": ("pixel accuracy", "{:.1%}"),
}
SPEEDS = {
    "images_per_s": ("train images/s", "{:,.0f}"),
    "data_share": ("waiting for data", "{:.1%}"),
    "targets_share": ("making targets", "{:.1%}"),
}
# Charts: title, kind of line in metrics.jsonl, figure, factor.
PANELS = (
    ("training loss", "train", "loss", 1),
    ("training loss, class token", "train", "class_loss", 1),
    ("training loss, tokens", "train", "token_loss", 1),
    ("top-1 on val, %", "eval", "top1", 100),
    ("mIoU on val, %", "eval", "miou", 100),
    ("tokens as the teacher on val, %", "eval", "teacher_accuracy", 100),
    ("nearest neighbours, %", "eval", "knn", 100),
    ("linear probe of the mean token, %", "eval", "image_probe", 100),
)


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The content of a run folder.

    `name`: on the page. `recipe`: settings by dotted names, as written by any version. `lines`: of metrics.jsonl.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the metrics of a kind, `train` or `eval`."""
        return [line for line in self.lines if line["kind"] == kind]

    @cached_property
    def final(self) -> dict[str, Any]:
        """The figures of `tokenlabel eval` if the run folder has its output, else of the last evaluation."""
        last = (self.of("eval") or [{}])[-1]
        try:
            figures = json.loads((self.folder / "eval.json").read_text(encoding="utf-8"))
            figures = figures.get(str(self.recipe.get("eval.inference")), figures)  # perhaps by kind of inference
        except (OSError, ValueError, AttributeError):
            return last
        return figures if isinstance(figures, dict) else last

    @cached_property
    def answers(self) -> Answers | None:
        """The prediction for each val image, if the run is a classifier's."""
        return read_answers(self.folder)

    @cached_property
    def albums(self) -> dict[str, Album]:
        """The albums of the run by kind."""
        folder = self.folder / PICTURES_FOLDER
        return {kind: album for kind in ("train", "val") if (album := read_album(folder, kind)) is not None}

    @property
    def progress(self) -> str:
        """The number of steps taken, and of how many if the albums state it."""
        done = self.lines[-1]["step"] if self.lines else 0
        planned = next((album.about.get("num_steps") for album in self.albums.values()), None)
        return f"{done:,}" if planned in (None, done) else f"{done:,} of {planned:,}"

    def minutes_at(self, step: int) -> float:
        """Return the training time before a step, without evaluations and pauses."""
        seconds, before = 0.0, 0
        for line in self.of("train"):
            if before >= step:
                break
            seconds += (min(line["step"], step) - before) * self.recipe["batch_size"] / line["images_per_s"]
            before = line["step"]
        return seconds / 60


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write the report of run folders to a self-contained HTML file.

    Raises ConfigError for a folder without a run, for the same folder twice, and for a file that cannot be written.
    """
    check_output(output)
    records = [read_run(run, name) for run, name in short_names(runs).items()]
    names = [record.name for record in records]
    page = Page(f"tokenlabel: {', '.join(names)}", [album for r in records for album in r.albums.values()])
    page.add("Results", _results(records), _remarks(records))
    if curves := list(_curves(records)):
        page.add("Curves", run_legend(names), f'<div class="curves">{"".join(curves)}</div>')
    _add_classes(page, records)
    _add_disagreements(page, records)
    _add_train_pictures(page, records)
    if names := [record.name for record in records if "val" in record.albums]:
        page.add(f"What {listed(names)} say{'s' * (len(names) == 1)} about val images", _val_pictures(page, records))
    page.add("Settings" if len(records) == 1 else "Settings that differ", _settings(records))
    page.write(output)


def short_names(runs: Sequence[Path]) -> dict[Path, str]:
    """Return for each run folder the shortest end of its path that is unique. Raises ConfigError for duplicates."""
    of_paths: dict[Path, Path] = {}
    for run in runs:
        if (other := of_paths.setdefault(run.resolve(), run)) is not run:
            raise ConfigError(f"{other} and {run} are the same run; name it once")
    parts = {run: path.parts for path, run in of_paths.items()}
    for count in range(1, max(map(len, parts.values()), default=0)):
        names = {run: "/".join(of_run[-count:]) for run, of_run in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: str(run) for run in runs}


def read_run(run: Path, name: str) -> RunRecord:
    """Return the content of a run folder. Raises ConfigError if it is none."""
    if url := as_url(run):
        raise ConfigError(f"{url}: expected a run folder on this machine; metrics and pictures are not pushed")
    if not (run / RECIPE_FILE).is_file():
        inside = sorted(str(path.parent) for path in run.glob(f"*/{RECIPE_FILE}"))
        found = f"holds no {RECIPE_FILE}" if run.exists() else "no such folder"
        meant = f"its runs {listed(inside)}" if inside else "a run folder that `tokenlabel train` made"
        raise ConfigError(f"{run}: {found}; give {meant}")
    recipe = without_secrets(read_yaml(run / RECIPE_FILE))  # a report is sent to others
    return RunRecord(name, run, flattened(recipe), read_metrics(run))


def _results(records: Sequence[RunRecord]) -> str:
    """Return the table of figures: those of the last evaluation, and medians of the training speed."""
    numbers = [
        {name: value for name, value in record.final.items() if isinstance(value, float) and name != "images_per_s"}
        for record in records
    ]
    others = {name: (name.replace("_", " "), "{:.3g}") for found in numbers for name in found if name not in COLUMNS}
    columns = {name: column for name, column in {**COLUMNS, **others}.items() if any(name in n for n in numbers)}
    columns |= SPEEDS
    rows = []
    for record, figures in zip(records, numbers, strict=True):
        train = record.of("train")
        for name in SPEEDS:
            if train and all(name in line for line in train):
                figures[name] = float(np.median([line[name] for line in train]))
        shown = [form.format(figures[name]) if name in figures else "–" for name, (_, form) in columns.items()]
        rows.append([record.name, record.progress, *shown])
    return table(["run", "steps", *(heading for heading, _ in columns.values())], rows)


def _remarks(records: Sequence[RunRecord]) -> str:
    """Return notes on the figures and on missing files."""
    remarks = []
    for record in records:
        figures, last = record.final, (record.of("eval") or [{}])[-1]
        step, absent = figures.get("step", np.inf), figures.get("absent_classes") or []
        count = figures.get("num_images", 0)
        own = last.get("num_images", count)
        notes = {
            f"the figures are of step {step:,}, and the run has gone on since; `tokenlabel eval` writes those of the "
            "newest checkpoint": step < last.get("step", 0),
            f"the figures of eval.json are of {count:,} images, those of the curves of {own:,}": count not in (0, own),
            f"mIoU leaves out what no mask holds ({listed(absent)})": absent,
            "has taken no steps yet": not record.lines,
            "holds no pictures; an older version trained it, or it was copied without pictures/": record.lines
            and not record.albums,
        }
        remarks += [f"{record.name}: {note}." for note, applies in notes.items() if applies]
    return "".join(f'<p class="note">{html.escape(remark)}</p>' for remark in remarks)


def _curves(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield charts of the losses and of accuracy against steps, and of accuracy against time."""
    for title, kind, name, factor in PANELS:
        # If a loss has parts, only these are drawn.
        of_runs = [
            [
                (line["step"], factor * line[name])
                for line in record.of(kind)
                if line.get(name) is not None and not (name == "loss" and "class_loss" in line)
            ]
            for record in records
        ]
        yield from line_chart(title, "step", of_runs)
        if kind == "eval":
            timed = [
                [(record.minutes_at(int(step)), value) for step, value in points]
                for record, points in zip(records, of_runs, strict=True)
            ]
            yield from line_chart(f"{title}, against time", "minutes of training", timed)


def class_accuracies(
    guesses: Int[NDArray[np.integer[Any]], " n"], truth: Int[NDArray[np.integer[Any]], " n"], num_classes: int
) -> Float[NDArray[np.float64], " C"]:
    """Return the accuracy on the images of each class; NaN for a class without images."""
    totals = np.bincount(truth, minlength=num_classes)
    right = np.bincount(truth[guesses == truth], minlength=num_classes)
    return np.divide(right, totals, out=np.full(num_classes, np.nan), where=totals > 0)


def _comparable(records: Sequence[RunRecord]) -> dict[str, Answers]:
    """Return predictions by run: of the first run that has some, and of those with the same images and classes."""
    found = {record.name: record.answers for record in records if record.answers is not None}
    first = next(iter(found.values()), None)
    return {
        name: answers
        for name, answers in found.items()
        if first and (answers.keys, answers.class_names) == (first.keys, first.class_names)
    }


def _add_classes(page: Page, records: Sequence[RunRecord]) -> None:
    """Add the figures of each class: accuracy of classifiers, IoU of segmentation models."""
    accuracies, ious = {}, {}
    for name, answers in _comparable(records).items():
        known = answers.truth >= 0
        shares = class_accuracies(answers.guesses[known], answers.truth[known], len(answers.class_names))
        accuracies[name] = dict(zip(answers.class_names, shares.tolist(), strict=True))
    for record in records:
        written = record.albums["val"].about if "val" in record.albums else {}
        if found := record.final.get("class_iou") or written.get("class_iou"):
            ious[record.name] = {name: np.nan if iou is None else iou for name, iou in found.items()}
    for title, of_runs in (("Accuracy by class", accuracies), ("IoU by class", ious)):
        if of_runs:
            page.add(title, _class_table(of_runs))


def _class_table(of_runs: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of the classes that differ most between the first two runs, or of the worst of a single run."""
    names, (first, *rest) = [*of_runs], [*of_runs.values()]
    known = [name for name, value in first.items() if not np.isnan(value)]
    headings = ["class", *names]
    change: dict[str, float] = {}
    if rest:
        change = {name: first[name] - rest[0].get(name, np.nan) for name in known}
        known.sort(key=lambda name: -abs(np.nan_to_num(change[name])))
        headings.append("first over second, points")
    else:
        known.sort(key=first.__getitem__)
    rows = []
    for name in known[:NUM_CLASSES]:
        values = [f"{shares.get(name, np.nan):.1%}" for shares in of_runs.values()]
        values += [f"{100 * change[name]:+.1f}"] if rest else []
        rows.append([shortened(with_words(name)), *("–" if "nan" in value else value for value in values)])
    if len(rows) == len(known):
        return table(headings, rows)
    which = "that change most" if rest else "with the lowest figures"
    return f'<p class="note">The {len(rows)} of {len(known):,} classes {which}.</p>{table(headings, rows)}'


def _add_disagreements(page: Page, records: Sequence[RunRecord]) -> None:
    """Add the images that one of the first two runs gets right and the other wrong."""
    both = [*_comparable(records).items()][:2]
    if len(both) < 2:
        return
    for (right, ours), (wrong, theirs) in (both, both[::-1]):
        places = np.flatnonzero((ours.guesses == ours.truth) & (theirs.guesses != ours.truth) & (ours.truth >= 0))
        title = f"Right by {right}, wrong by {wrong}: {len(places):,} of {len(ours.keys):,} images"
        rows = [
            [ours.keys[i], *(_answer(answers, i) for answers in (ours, theirs))]
            for i in places[np.argsort(-theirs.probs[places].astype(float), kind="stable")][:NUM_DISAGREEMENTS].tolist()
        ]
        if not rows:
            page.add(title, "<p>None.</p>")
            continue
        keys = {ours.keys[i] for i in places.tolist()}
        pictures = _val_pictures(page, [r for name in (right, wrong) for r in records if r.name == name], keys)
        surest = f'<p class="note">The {len(rows)} of which {html.escape(wrong)} is surest:</p>'
        note = surest if len(rows) < len(places) else ""
        page.add(title, pictures, note, table(["image", f"{right} says", f"{wrong} says"], rows))


def _answer(answers: Answers, i: int) -> str:
    return f"{shortened(with_words(answers.class_names[answers.guesses[i]]))}, {answers.probs[i]:.0%}"


def _add_train_pictures(page: Page, records: Sequence[RunRecord]) -> None:
    """Add the first batch of the first run whose images had maps, else of the first that wrote one."""
    albums = [(record, record.albums["train"]) for record in records if "train" in record.albums]
    labelled = [pair for pair in albums if page.legend((pair[1], p) for p in pair[1].about["pictures"])]
    for record, album in (labelled or albums)[:1]:
        step = album.about.get("step", 0)
        title = f"What {record.name} is trained on: its {'first batch' if not step else f'batch of step {step:,}'}"
        page.add_album(title, album)


def _val_pictures(page: Page, records: Sequence[RunRecord], keys: set[str] | None = None) -> str:
    """Return val images (`keys`: only these) with the predictions of all runs side by side."""
    of_keys: dict[str, list[tuple[RunRecord, Album, dict[str, Any]]]] = {}
    for record in records:
        if album := record.albums.get("val"):
            for picture in album.about["pictures"]:
                if keys is None or picture["key"] in keys:
                    of_keys.setdefault(picture["key"], []).append((record, album, picture))
    figures = []
    for found in of_keys.values():
        (_, album, first), captions = found[0], []
        tiles = [(album, tile) for tile in first["tiles"] if tile["text"] != "prediction"]
        for record, album, picture in found:
            names = [record.name] if len(records) > 1 else []
            text = ": ".join([*names, *filter(None, [picture["answer"]])]) or "prediction"
            maps = [(album, {**tile, "text": text}) for tile in picture["tiles"] if tile["text"] == "prediction"]
            tiles += maps
            captions += [text] if picture["answer"] and not maps else []
        figures.append(page.figure(tiles, "<br>".join([caption(first), *map(html.escape, captions)])))
    legend = page.legend((album, picture) for found in of_keys.values() for _, album, picture in found)
    broad = " broad" if len(records) > 3 else ""
    return f'{legend}<div class="pictures{broad}">{"".join(figures)}</div>'


def _settings(records: Sequence[RunRecord]) -> str:
    """Return the settings in which runs differ; all of a single one."""
    names = dict.fromkeys(name for record in records for name in record.recipe)
    rows = [[name, *(str(record.recipe.get(name, "–")) for record in records)] for name in names]
    rows = [row for row in rows if len(records) == 1 or len(set(row[1:])) > 1]
    return table(["setting", *(record.name for record in records)], rows) if rows else "<p>None.</p>"

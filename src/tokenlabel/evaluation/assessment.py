"""`tokenlabel eval`: evaluates a network on a data set, in one process or under torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokenlabel.core.batch import Batch
from tokenlabel.core.config import Inference
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import ScoreMaps, TokenLabelDataset, check_labels, make_loader
from tokenlabel.data.class_names import class_order, say_imagenet
from tokenlabel.data.classes import ClassList
from tokenlabel.data.decoding import ImageCheck
from tokenlabel.data.imagenet import (
    SETS,
    EvaluationSet,
    as_classes_of,
    corruption_figures,
    corruption_folders,
    imagenet_ids,
    read_folder,
    read_multi_labels,
    read_real_labels,
)
from tokenlabel.data.images import ImageFiles, ImageSource, has_classes
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.samplers import EvalBatchSampler
from tokenlabel.data.sources import open_aloud, open_images
from tokenlabel.evaluation.evaluators import (
    Accuracy,
    Calibration,
    Evaluator,
    MultiLabel,
    PerClass,
    RealLabels,
    TokenTruth,
    observe,
)
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.evaluation.options import EvalOptions
from tokenlabel.evaluation.probe import image_figures, probe_sets
from tokenlabel.labels.fingerprints import say_replaced
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import TokenModel
from tokenlabel.models.load import LoadedModel, load_model
from tokenlabel.models.names import PlainClassifier
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.distributed import Ranks, joined_ranks, usable_device
from tokenlabel.runtime.errors import ConfigError, DataError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.training.checkpoint import with_recipe
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_images import sound_images

Figures = dict[str, Any]


def assess(name: str | Path, options: EvalOptions, *, device: torch.device | str) -> Figures:
    """Return the metrics of a network on a data set, over all ranks; with inference `all`, of each way to predict.

    `name`: a run, a checkpoint folder, or the name of a model. Raises ValueError for options, images or classes that do
    not fit the network.
    """
    options.check()
    device = usable_device(device)
    loaded = load_model(name, weights=options.weights, img_size=options.size, at_test_size=True)
    network = with_recipe(replace(loaded, img_size=pair(options.size)) if options.size else loaded)
    if options.set != "folder" or options.multi_labels is not None:
        network = _named(network, options.class_order)
    heads = _chosen_heads(network, options.inference)
    network.model.to(device, memory_format=torch.channels_last).requires_grad_(False)
    with joined_ranks(device) as ranks:
        assessment = _Assessment(network, options, heads, ranks, device)
        found = assessment.of_corruptions() if options.set == "imagenet-c" else assessment.of_images()
    about: Figures = {"network": network.name, "img_size": list(network.img_size)}
    about |= {} if network.step is None else {"step": network.step}
    named = network.num_classes > 0  # without a class head only tokens and features are evaluated
    labelled = {
        head.value: {**about, **({"inference": head.value} if named else {}), **_nested(found[head])} for head in heads
    }
    return labelled if options.inference == "all" else labelled[heads[0].value]


def _chosen_heads(network: LoadedModel, wanted: str | None) -> tuple[Inference, ...]:
    """Return the ways to predict: by default the first one. Raises ConfigError for a head that was never trained."""
    if wanted is None:
        return network.heads[:1]
    if wanted == "all":
        return tuple(head for head in Inference if head in network.heads)
    if Inference(wanted) not in network.heads:
        about = f": its tokens are about {network.token_classes}, not its {network.num_classes:,} classes"
        if network.token_classes is None:
            about = " was trained without token labels, so its token head is untrained"
        raise ConfigError(f"{network.name}{about}; evaluate it with --inference class")
    return (Inference(wanted),)


def _named(network: LoadedModel, order: str | None) -> LoadedModel:
    """Return a network with the class names that the user gives it, or print that ImageNet's are assumed."""
    if order is not None:
        known = () if network.names_assumed else network.class_names
        names = class_order(order, (), known, count=network.num_classes)
        return replace(network, class_names=tuple(names), names_assumed=False)
    if network.names_assumed:
        say_imagenet(network.class_names, them="the model", option="--class-order")
    return network


@dataclass(frozen=True, eq=False)
class _Assessment:
    """An evaluation: the network, on its device, and what to evaluate it on."""

    network: LoadedModel
    options: EvalOptions
    heads: Sequence[Inference]
    ranks: Ranks
    device: torch.device

    def of_images(self) -> dict[Inference, Figures]:
        """Return the metrics on one set of images, and of probes, by the way to predict."""
        names, options = self._class_names(), self.options
        probes = self._probe_figures()
        if not self.network.num_classes:
            self._check_without_classes(probes)
            if not self._truths:
                return {head: dict(probes) for head in self.heads}
        if options.multi_labels is not None:
            of_image = read_multi_labels(options.multi_labels, names)
            none = np.zeros(len(of_image), np.int64)  # not used: `MultiLabel` has the classes of each image
            source = ImageFiles(self._folder(), [*of_image], none, names)
            say(f"{self._folder()}: {len(of_image):,} images, each of any number of classes")
            images = self._sound(EvaluationSet(source))
            found = self._pass(images, {head: [MultiLabel(of_image)] for head in self.heads})
            return {head: figures | probes for head, figures in found.items()}
        images = self._sound(self._open())
        found = self._pass(images, {head: self._evaluators(images) for head in self.heads})
        for name, store in self._token_truths(images.source):
            truth, classes = TokenTruth(name), self._token_classes()
            of_tokens = self._pass(images, {Inference.CLASS: [truth]}, store=store)
            if (absent := truth.absent(classes.labels)) and not classes.words:
                say(f"no {name} shows {len(absent):,} classes ({listed(absent)}): {name}_miou leaves them out")
            of_tokens[Inference.CLASS].pop("images_per_s")
            found = {head: figures | of_tokens[Inference.CLASS] for head, figures in found.items()}
        return {head: figures | probes for head, figures in found.items()}

    def _check_without_classes(self, probes: Figures) -> None:
        """Raise ConfigError for options that need a class head, and if there is nothing else to evaluate."""
        network, options = self.network, self.options
        options.leave_out(
            f"{network.name} has no class head, so it names no classes", "real", "per_class", "multi_labels"
        )
        asked = options.data or (network.recipe and network.recipe.data.val)
        if (options.data is not None or not probes) and not self._truths:
            at = f" and cannot be evaluated on the classes of {asked}" if asked else ""
            raise ConfigError(
                f"{network.name} has no class head{at}; give --probe DIR, a few images with classes, for probes of its "
                "features, or --labels STORE of --data, for how far its tokens agree with the teacher"
            )

    def _probe_figures(self) -> Figures:
        """Return the accuracy of probes of the frozen features on the images of --probe, or the recipe's."""
        network, options, recipe = self.network, self.options, self.network.recipe
        probe, test = options.probe, options.probe_test
        if probe is None and recipe is not None and recipe.eval.probe is not None and options.data is None:
            probe, test = Path(recipe.eval.probe), recipe.eval.probe_test
        if probe is None:
            return {}
        model = network.model
        if isinstance(model, PlainClassifier):
            try:
                model = model.with_tokens(network.name, network.img_size)
            except ValueError as error:
                raise ConfigError(f"{error}; or leave --probe out") from error
        assert isinstance(model, TokenModel)
        learn, judged = probe_sets(probe, test, self._transform())
        batches = (self._batches(dataset) for dataset in (learn, judged))
        num_classes = len(learn.source.class_names)
        return image_figures(model.eval(), *batches, num_classes=num_classes, ranks=self.ranks)

    @property
    def _truths(self) -> bool:
        """Whether the tokens are compared with masks, or with a teacher's labels."""
        return self.options.masks is not None or bool(self._labels())

    def _labels(self) -> list[str]:
        """Return the folders of a teacher's labels of the images, if there are any."""
        recipe, options = self.network.recipe, self.options
        if options.labels is not None:
            return [str(options.labels)]
        return recipe.eval.label_folders if recipe is not None and options.data is None else []

    def _open(self) -> EvaluationSet:
        network, options, folder = self.network, self.options, self._folder()
        needed = not self._truths or options.per_class or options.real is not None
        how = {"assumed": network.names_assumed, "order": options.class_order, "needed": needed}
        try:
            if not network.num_classes:
                return EvaluationSet(open_aloud(folder, classes=False))
            if options.set != "folder":
                return SETS[options.set](folder, network.class_names, network.num_classes)
            return read_folder(folder, network.class_names, network.num_classes, **how)
        except DataError as error:
            if options.data is not None:
                raise
            raise DataError(f"{error} (the val images of its recipe; --data names others)") from error

    def of_corruptions(self) -> dict[Inference, Figures]:
        """Return the metrics of ImageNet-C, by the way to predict."""
        top1: dict[Inference, dict[tuple[str, int], float]] = {head: {} for head in self.heads}
        for corruption, folder in corruption_folders(self._folder()).items():
            images = SETS["folder"](folder, self.network.class_names, self.network.num_classes)
            images = self._sound(images, when_skipping=True)
            found = self._pass(images, {head: [Accuracy()] for head in self.heads})
            for head, figures in found.items():
                top1[head][corruption] = figures["top1"]
        return {head: corruption_figures(of_head) for head, of_head in top1.items()}

    def _pass(
        self,
        images: EvaluationSet,
        evaluators: Mapping[Inference, Sequence[Evaluator]],
        *,
        store: ScoreMaps | None = None,
    ) -> dict[Inference, Figures]:
        """Run the network once over all images."""
        dataset = TokenLabelDataset(images.source, self._transform(), seed=0, store=store)
        return observe(
            self.network.model,
            self._batches(dataset),
            evaluators,
            precision=self.options.precision or self.network.precision,
            ranks=self.ranks,
            competing=None if images.competing is None else torch.from_numpy(images.competing),
        )

    def _transform(self) -> EvalTransform:
        return EvalTransform(
            self.network.img_size,
            crop_fraction=self.options.crop_fraction or self.network.crop_fraction,
            interpolation=self.network.interpolation,
        )

    def _batches(self, dataset: TokenLabelDataset) -> Iterator[Batch]:
        """Yield this rank's part of the images, on the device."""
        size, ranks = self.options.batch_size, self.ranks
        sampler = EvalBatchSampler(
            num_images=len(dataset), batch_size=size, rank=ranks.rank, world_size=ranks.world_size
        )
        loader = make_loader(dataset, sampler, num_workers=self.options.num_workers)
        batches, silent = read_ahead(dataset.source, sampler, loader), None if ranks.is_first else True
        for batch in tqdm(batches, desc="eval", unit="batch", total=len(sampler), disable=silent):
            yield batch.to(self.device)

    def _folder(self) -> Path:
        recipe = self.network.recipe
        folder = self.options.data or (Path(recipe.data.val) if recipe and recipe.data.val else None)
        if folder is None:
            raise ConfigError(f"{self.network.name} has no val images of its own; name images with --data")
        return folder

    def _sound(self, images: EvaluationSet, *, when_skipping: bool = False) -> EvaluationSet:
        """Return the set without images that do not decode. `when_skipping`: check only if these are left out."""
        recipe, skip_broken = self.network.recipe, self.options.skip_broken
        if skip_broken is None:
            skip_broken = recipe is not None and recipe.data.skip_broken
        if when_skipping and not skip_broken:
            return images
        check = recipe.data.check if recipe is not None else ImageCheck.AUTO
        source = sound_images(images.source, skip_broken=skip_broken, check=check, option="--skip-broken")
        return replace(images, source=source)

    def _class_names(self) -> Sequence[str]:
        return self.network.class_names or [str(c) for c in range(self.network.num_classes)]

    def _token_classes(self) -> ClassList:
        return self.network.token_classes or ClassList(self.network.num_classes, tuple(self._class_names()))

    def _evaluators(self, images: EvaluationSet) -> list[Evaluator]:
        if not self.network.num_classes or not has_classes(images.source).any():
            return []
        found: list[Evaluator] = [Accuracy(), Calibration()]
        if self.options.real is not None:
            ids = imagenet_ids(images.source.class_names, self.network.num_classes, self.options.real)
            labels = read_real_labels(self.options.real)
            found.append(RealLabels({name: ids[classes].tolist() for name, classes in labels.items()}))
        if self.options.per_class:
            found.append(PerClass(images.source.class_names))
        return found

    def _token_truths(self, source: ImageSource) -> Iterator[tuple[str, ScoreMaps]]:
        """Yield the dense labels to compare the tokens with, and the prefix of the metrics' names."""
        masks, labels, classes = self.options.masks, self._labels(), self._token_classes()
        name, has_head = self.network.name, self.network.has_token_head
        refuse(
            {
                f"{name} has no head for tokens that was trained; leave --masks and --labels out": not has_head
                and (masks or self.options.labels),
                f"{name}: its tokens are about {classes}, no masks; leave --masks out": masks and classes.words,
            }
        )
        if masks is not None:
            names = classes.labels
            truth = MaskFolder(
                masks, num_classes=len(names), ignore_index=self.options.ignore_index, source=source, class_names=names
            )
            truth.check(names)
            yield "token", truth
        if labels:
            store = LabelStore(*labels)
            # By the names of the images' classes where they have some: the network may know its own by number only.
            known = self.network.token_classes or (None if source.class_names else classes)
            self.ranks.on_main(lambda: check_labels(source, store, max_missing=1.0, classes=known))
            self.ranks.on_main(lambda: say_replaced(store, source))
            yield "teacher", store


def _nested(figures: Figures) -> Figures:
    """Return the figures with `per_class/NAME` of all classes in one dictionary."""
    plain = {name: value for name, value in figures.items() if "/" not in name}
    of_classes = {name.partition("/")[2]: value for name, value in figures.items() if "/" in name}
    return {**plain, "per_class": of_classes} if of_classes else plain


def evaluation_set(
    recipe: Recipe,
    *,
    class_names: Sequence[str],
    data: str | Path | None = None,
    sound: Callable[[ImageSource], ImageSource] | None = None,
) -> TokenLabelDataset:
    """Return the images that a recipe evaluates on, or those in the folder `data`, transformed for the model.

    `class_names`: of the model; empty if it has no class head, which allows images of any layout. `sound`: leaves out
    images that do not decode; by default as the recipe says. Raises ValueError if there are no images, or if one has a
    class that the model does not have.
    """
    folder = data or recipe.data.val
    if folder is None:
        raise ValueError("the run has no val images of its own; name images with --data")
    if sound is None:
        skip_broken, check = recipe.data.skip_broken, recipe.data.check
        sound = partial(sound_images, skip_broken=skip_broken, check=check, option=None)
    source = sound(open_images(folder, classes=bool(class_names)))
    if class_names and (has_classes(source).any() or not recipe.eval.labels):
        source = as_classes_of(source, class_names, len(class_names), folder)
    transform = EvalTransform(recipe.model.img_size, crop_fraction=recipe.eval.crop_fraction)
    return TokenLabelDataset(source, transform, seed=recipe.seed)

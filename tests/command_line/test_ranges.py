"""Numbers that mean nothing are refused where they are typed, before anything runs."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tokenlabel.cli import main
from tokenlabel.core.config import ErasingConfig, LossConfig, MixConfig, OnlineTeacherConfig
from tokenlabel.data.config import AugmentConfig, ColourJitter, WarpConfig
from tokenlabel.evaluation.options import EvalOptions
from tokenlabel.labels.inspection import InspectConfig
from tokenlabel.labels.options import ImportConfig
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.runtime.coercion import check_numbers
from tokenlabel.segmentation.recipe import (
    Layout,
    SegmentAugmentConfig,
    SegmentDataConfig,
    SegmentEvalConfig,
    SegmentLossConfig,
)
from tokenlabel.teachers.options import AnnotateConfig, FitConfig
from tokenlabel.training.recipe import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainingConfig,
)

NAN, INF = math.nan, math.inf
OPTIM: dict[str, Any] = {"lr": 1e-3, "lr_batch_size": 8}
# What each field of a configuration must not be.
REFUSED: list[tuple[type, dict[str, Any], dict[str, list[Any]]]] = [
    (
        TrainingConfig,
        {"optim": OptimConfig(**OPTIM), "epochs": 1, "batch_size": 8},
        {**{key: [0, -1] for key in ("epochs", "num_steps", "batch_size", "micro_batch_size")}, "seed": [-1, 2**70]},
    ),
    (
        OptimConfig,
        OPTIM,
        {
            "lr": [0.0, -1.0, NAN, INF],
            "lr_batch_size": [0],
            **{key: [-1.0, NAN, INF] for key in ("min_lr", "warmup_lr", "weight_decay")},
            **{key: [-1.0, NAN, INF] for key in ("warmup_epochs", "cooldown_epochs")},
            "warmup_steps": [-1],
            "layer_decay": [0.0, 1.5, NAN],
            "ema_decay": [-0.1, 1.0, NAN],
            "clip_grad_norm": [0.0, -1.0, NAN],
        },
    ),
    (DataConfig, {"train": "a"}, {"num_workers": [-1], "tar_window": [0]}),
    (ModelConfig, {"name": "a"}, {"img_size": [(0, 32), (32, -1), (0, 0)], "frozen_layers": [-1]}),
    (MixConfig, {}, {"alpha": [0.0, NAN, INF], "probability": [-0.1, NAN], "group_size": [0]}),
    (EvalConfig, {}, {"batch_size": [0], "every_epochs": [0.0, NAN, INF], "crop_fraction": [0.0, 1.5, NAN]}),
    (CheckpointConfig, {}, {"keep": [0], "every_epochs": [0.0, INF], "keep_every_epochs": [-1.0, NAN]}),
    (LossConfig, {}, {"beta": [-1.0, NAN, INF], "temperature": [0.0, NAN], "label_smoothing": [NAN]}),
    (OnlineTeacherConfig, {}, {"size": [0], "topk": [0]}),
    (
        AugmentConfig,
        {},
        {
            "crop_ratio": [(1.0, INF), (0.0, 1.0)],
            "crop_scale": [(0.0, 1.0), (0.5, NAN), (0.5, 2.0)],
            "warp": [WarpConfig(degrees=-1.0), WarpConfig(shear=NAN)],
            "jitter": [ColourJitter(brightness=-1.0), ColourJitter(hue=0.6)],
        },
    ),
    (
        AnnotateConfig,
        {"teacher": "a"},
        {"topk": [0], "batch_size": [0], "num_workers": [-1], "shard_s": [0.0, NAN], "size": [0]},
    ),
    (FitConfig, {"backbone": "a", "from_": "labels"}, {"seed": [-1, 2**70]}),
    (ErasingConfig, {}, {"probability": [-0.1, 1.1, NAN], "area": [(0.0, 0.5), (0.5, 1.0)]}),
    (InspectConfig, {}, {"sample": [-1], "num_suspects": [-1]}),
    (ImportConfig, {"num_classes": 3}, {"num_classes": [0, 1], "num_workers": [-1]}),
    (SegmentDataConfig, {"layout": Layout.SCENES, "root": "a"}, {"num_workers": [-1]}),
    (
        SegmentModelConfig,
        {"name": "a"},
        {
            **{key: [0] for key in ("neck_width", "head_width")},
            "img_size": [(0, 8)],
            "layers": [(0, -1)],
            "norm_eps": [0.0],
            "dropout": [1.0, -0.1],
        },
    ),
    (SegmentLossConfig, {}, {"auxiliary_weight": [-1.0, NAN]}),
    (
        SegmentEvalConfig,
        {},
        {
            "scales": [(), (1.0, NAN), (0.0,)],
            "short_side_px": [0],
            "stride_px": [(0, 1)],
            "max_aspect": [0.5, NAN],
            "every_epochs": [INF],
            "windows_at_once": [0],
        },
    ),
    (SegmentAugmentConfig, {}, {"scale": [(1.0, INF)], "short_side_px": [0], "max_aspect": [NAN]}),
]


@pytest.mark.parametrize(("kind", "good", "refused"), REFUSED, ids=lambda part: getattr(part, "__name__", ""))
def test_each_field_refuses_what_means_nothing(kind: type, good: dict[str, Any], refused: dict[str, list[Any]]) -> None:
    kind(**good)
    for name, values in refused.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                kind(**{**good, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"num_workers": -1}, "--num-workers must be at least 0, got -1"),
        ({"size": 0}, "--size must be at least 1, got 0"),
        ({"crop_fraction": NAN}, "--crop-fraction must be a finite number, got nan"),
    ],
)
def test_the_options_of_an_evaluation_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalOptions(**changes).check()


@pytest.mark.parametrize(
    ("interval", "number", "words"),
    [
        ("[1, inf)", 0, "x must be at least 1, got 0"),
        ("(0, 1]", 0.0, "x must be above 0 and at most 1, got 0.0"),
        ("[0, 1)", 1.0, "x must be at least 0 and below 1, got 1.0"),
        ("(0, inf)", INF, "x must be a finite number, got inf"),
        ("[0, 1]", (0.5, NAN), r"x must be a finite number, got \[0.5, nan\]"),
    ],
)
def test_what_is_expected_is_said(interval: str, number: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        check_numbers(SimpleNamespace(x=number), x=interval)


TRAIN = "train --recipe demo_teacher --out ./out --data.train ./images"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{TRAIN} --epochs 0", "--epochs must be at least 1, got 0"),
        (f"{TRAIN} --epochs -1", "--epochs must be at least 1, got -1"),
        (f"{TRAIN} --batch_size 0", "--batch-size must be at least 1, got 0"),
        (f"{TRAIN} --optim.weight-decay=-1", "--optim.weight-decay must be at least 0, got -1.0"),
        (f"{TRAIN} --augment.jitter.hue 1", "--augment.jitter.hue must be at least 0 and at most 0.5, got 1.0"),
        (f"{TRAIN} --optim.lr .nan", "--optim.lr must be a finite number, got nan"),
        (f"{TRAIN} --epochs many", "--epochs: expected int or null, got 'many'"),
        (f"{TRAIN} --precision fp64", "--precision: expected one of fp32, bf16, fp16; got 'fp64'"),
        ("annotate ./images ./labels --teacher x --topk 0", "--topk must be at least 1, got 0"),
        ("inspect ./labels --sample -1", "--sample must be at least 0, got -1"),
        ("import-labels ./a ./b --images ./c --num-classes 0", "--num-classes must be at least 2, got 0"),
        ("eval ./out --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("segment eval ./out --num-workers -1", "--num-workers must be at least 0, got -1"),
    ],
)
def test_a_command_line_is_refused_in_the_words_that_were_typed(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")

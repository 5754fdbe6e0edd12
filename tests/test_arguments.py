"""How options may be written on a command line."""

import re
from pathlib import Path

import pytest

from tokenlabel.cli import main
from tokenlabel.runtime.arguments import new_parser, parse
from tokenlabel.runtime.configuration import add_config_arguments, config_of
from tokenlabel.teachers.annotation import AnnotateConfig


def read(*arguments: str) -> AnnotateConfig:
    parser = new_parser("annotate", "")
    parser.add_argument("images")
    parser.add_argument("store")
    add_config_arguments(parser, AnnotateConfig)
    return config_of(parser, parse(parser, [*arguments]), AnnotateConfig)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("images", "labels", "--strict"), {"strict": True}),
        (("--strict", "images", "labels"), {"strict": True}),
        (("images", "labels", "--flip", "--strict", "false"), {"flip": True, "strict": False}),
        (("images", "labels", "--strict=true", "--flip=false"), {"strict": True, "flip": False}),
        (("images", "labels", "--class-map", "a-b.csv"), {"class_map": "a-b.csv"}),
        (("images", "labels", "--class_map=a-b.csv"), {"class_map": "a-b.csv"}),
        (("images", "labels", "--batch-size=3"), {"batch_size": 3}),
        (("images", "labels", "--topk", "1", "--topk", "2"), {"topk": 2}),
        (("images", "labels", "--weights", "a.pth", "--weights=b.pth"), {"weights": ["a.pth", "b.pth"]}),
    ],
)
def test_options_may_be_written_short(arguments, changes):
    assert read("--teacher", "t", *arguments) == AnnotateConfig(teacher="t", **changes)


def test_several_teachers():
    one, two, three = (["--teacher", name] for name in ("resnet18", "local-dir:x", "masks:y"))
    assert read("images", "labels", *one).teacher == "resnet18"
    assert read(*one, "images", "labels", *two, *three).teacher == ["resnet18", "local-dir:x", "masks:y"]


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="unrecognized arguments: --strct; did you mean --strict"):
        read("images", "labels", "--teacher", "t", "--strct")


def test_the_label_guide_names_options_that_exist(capsys):
    named = set(re.findall(r"--[a-z][a-z_.-]*", (Path(__file__).parents[1] / "docs/labels.md").read_text()))
    assert {"--strict", "--class-map", "--num-classes", "--region"} <= named
    for verb in ("annotate", "inspect", "merge", "import-labels", "train", "compare"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
    known = capsys.readouterr().out.replace("_", "-")
    benchmarks = {"--device"}
    assert [name for name in named - benchmarks if name.replace("_", "-") not in known] == []

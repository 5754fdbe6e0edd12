"""Whose classes, in which order: names are compared wherever two lists of classes meet, and guesses are said."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from timm.models import save_for_hf

from tokenlabel.cli import main
from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.core.scores import from_mask
from tokenlabel.data.batches import check_labels
from tokenlabel.data.class_names import class_order, read_class_names
from tokenlabel.data.classes import ClassList, ids_among
from tokenlabel.data.imagenet import SETS, as_classes_of, read_real_labels
from tokenlabel.data.images import ImageFolder
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.assessment import evaluation_set
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import TimmAdapter, create_model
from tokenlabel.runtime.errors import ConfigError, DataError
from tokenlabel.runtime.process import listed, read_json
from tokenlabel.teachers.classmap import class_map_for
from tokenlabel.teachers.ensemble import load_online_teacher, name_classes
from tokenlabel.teachers.networks import load_teacher
from tokenlabel.teachers.options import TeacherConfig
from tokenlabel.training.checkpoint import TrainState, load_run, save_checkpoint
from tokenlabel.training.recipe import DataConfig, EvalConfig, ModelConfig, OptimConfig, Recipe

CPU = torch.device("cpu")
NAME = "test_resnet"
SIZE_PX = 64
NUMBERS = [str(i) for i in range(12)]
WNIDS = ImageNetInfo("imagenet-1k").label_names()


def colours(count: int) -> np.ndarray:
    """Colours far from each other."""
    levels = [0, 128, 255]
    return np.array([(r, g, b) for r in levels for g in levels for b in levels][:count], np.uint8)


def write_images(root: Path, names: list[str], *, colour_of: dict[str, int] | None = None) -> Path:
    """One image a class, of a colour of its own."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        rgb = tuple(colours(27)[place if colour_of is None else colour_of[name]].tolist())
        Image.new("RGB", (SIZE_PX, SIZE_PX), rgb).save(root / name / "x.png")
    return root


def network(num_classes: int, classes: list[int]) -> Any:
    """A timm network that knows for certain which of `classes` an image of each colour shows."""
    torch.manual_seed(0)
    model: Any = timm.create_model(NAME, num_classes=num_classes).eval()
    pixels = torch.from_numpy(colours(len(classes)))[:, :, None, None].expand(-1, -1, SIZE_PX, SIZE_PX)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        features = model.forward_head(model.forward_features((pixels / 255 - mean) / std), pre_logits=True)
        wanted = torch.zeros(len(classes), num_classes)
        wanted[range(len(classes)), classes] = 30
        model.get_parameter("fc.weight").copy_((torch.linalg.pinv(features.double()) @ wanted.double()).T)
        model.get_parameter("fc.bias").zero_()
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[int, str]:
    """Files of such networks by their number of classes: the colours in order are classes 0, 1, 2, ..."""
    folder = tmp_path_factory.mktemp("weights")
    files = {count: str(folder / f"{count}.safetensors") for count in (3, 12, 1000)}
    for count, file in files.items():
        save_file(network(count, list(range(min(count, 12)))).state_dict(), file)
    return files


class Done(NamedTuple):
    """What a command returned, said on stderr and printed."""

    status: int
    said: str
    printed: str

    @property
    def top1(self) -> float:
        return json.loads(self.printed.splitlines()[-1])["top1"]


def run(capsys, *words: str) -> Done:
    capsys.readouterr()
    status = main([*map(str, words)])
    captured = capsys.readouterr()
    return Done(status, captured.err, captured.out)


def stored_top1(folder: str, classes: list[str]) -> float:
    """How often the most probable class of a map is that of the image's folder."""
    store = LabelStore(folder)
    right = [
        classes[store[key].dense().mean(axis=(0, 1)).argmax()] == key.split("/")[0]
        for key in store.keys()  # noqa: SIM118  (not a dict)
    ]
    assert right
    return float(np.mean(right))


def annotate_words(images: str, labels: str, *more: str, teacher: str = NAME) -> list[str]:
    return ["annotate", images, labels, "--teacher", teacher, "--size", str(SIZE_PX), "--device", "cpu", *more]


def eval_words(images: str, *more: str, network: str = NAME) -> list[str]:
    seen = ["--size", str(SIZE_PX), "--crop-fraction", "1", "--num-workers", "0", "--device", "cpu", "--json"]
    return ["eval", network, "--data", images, *seen, *more]


@pytest.fixture
def numbered(tmp_path, monkeypatch) -> str:
    """Folders 0 to 11 whose class is their number, as timm's scripts train; strings sort 10 before 2."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), NUMBERS)
    return "images"


def test_the_order_of_a_teacher_without_names_is_said_and_overruled(numbered, weights, capsys):
    file = ["--weights", weights[12]]
    guess = "12 classes are the images' in sorted order: 0 = 0, 1 = 1, 2 = 10; in natural order, which timm's"
    done = run(capsys, *annotate_words(numbered, "guessed", *file))
    assert done.status == 0
    assert f"WARNING: assuming the teacher's {guess}" in done.said
    assert "overrule with --class-order natural, sorted or FILE" in done.said
    assert stored_top1("guessed", sorted(NUMBERS)) == pytest.approx(2 / 12)  # what the warning is about
    done = run(capsys, *annotate_words(numbered, "told", *file, "--class-order", "natural"))
    assert (done.status, "assuming" in done.said) == (0, False)
    assert stored_top1("told", sorted(NUMBERS)) == 1
    done = run(capsys, *annotate_words(numbered, "as-sorted", *file, "--class-order", "sorted"))
    assert (done.status, "assuming" in done.said) == (0, False)

    done = run(capsys, *eval_words(numbered, *file))
    assert f"WARNING: assuming the model's {guess}" in done.said
    assert done.top1 == pytest.approx(2 / 12)
    done = run(capsys, *eval_words(numbered, *file, "--class-order", "natural"))
    assert (done.status, done.top1, "assuming" in done.said) == (0, 1.0, False)


def test_an_order_without_another_reading_is_said_in_one_calm_line(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), ["ant", "bee", "cat"])
    done = run(capsys, *annotate_words("images", "labels", "--weights", weights[3]))
    assert "assuming the teacher's 3 classes are the images' in sorted order: 0 = ant, 1 = bee, 2 = cat" in done.said
    assert "WARNING" not in done.said


ORDER_FILES = {
    "order.txt": "\n".join(NUMBERS) + "\n",
    "windows.txt": "\ufeff" + "\r\n".join(NUMBERS) + "\r\n\r\n",
    "order.tsv": "\n".join(f"{name}\tnumber {name}" for name in NUMBERS),
    "list.json": json.dumps(NUMBERS),
    "class_to_idx.json": json.dumps({name: int(name) for name in sorted(NUMBERS)}),
    "ids.txt": "\n".join(f"{i} class {i}" for i in range(12)),
    "ids.csv": "id,name\n" + "\n".join(f"{i},class {i}" for i in range(12)),
    "behind.txt": "\n".join(f"class {i}:{i}" for i in reversed(range(12))),
    "from_1.tsv": "# made by hand\n" + "\n".join(f"{i + 1}\tclass {i}" for i in range(12)),
    "data.yaml": "names:\n" + "\n".join(f"  {i}: class {i}" for i in range(12)),
    "plain.txt": "\n".join(f"class {i}" for i in range(12)),
    "config.json": json.dumps({"id2label": {i: f"class {i}" for i in range(12)}}),
    "labels.json": json.dumps({"label_names": [f"class {i}" for i in range(12)], "num_classes": 12}),
    "keras.json": json.dumps({i: [f"class {i}", "x"] for i in range(12)}),
    "idx_to_class.json": json.dumps({int(name): name for name in NUMBERS}),
}


def test_files_say_the_order_of_a_network_for_eval_and_the_online_teacher(numbered, weights, capsys):
    for name, text in ORDER_FILES.items():
        Path(name).write_text(text, encoding="utf-8", newline="")
        if "class " in text:
            ours = sorted(f"class {i}" for i in range(12))
            assert class_order(name, ours, (), count=12) == [f"class {i}" for i in range(12)], name
            assert class_order(name, (), (), count=12)[11] == "class 11"
            continue
        done = run(capsys, *eval_words(numbered, "--weights", weights[12], "--class-order", name))
        assert (name, done.top1, "assuming" in done.said) == (name, 1.0, False)
    images = torch.from_numpy(colours(12))[:, :, None, None].expand(-1, -1, SIZE_PX, SIZE_PX).contiguous()
    for order in ("natural", "order.tsv"):
        config = OnlineTeacherConfig(name=NAME, weights=weights[12], class_order=order)
        online = load_online_teacher(config, sorted(NUMBERS), CPU)
        assert online is not None
        for of_image in (
            online.probabilities(images)[0].argmax(dim=1),
            online.probabilities(images)[1].mean((1, 2)).argmax(1),
        ):
            assert [sorted(NUMBERS)[i] for i in of_image.tolist()] == NUMBERS
    load_online_teacher(OnlineTeacherConfig(name=NAME, weights=weights[12]), sorted(NUMBERS), CPU)
    said = capsys.readouterr().err
    assert "WARNING: assuming the teacher's 12 classes" in said
    assert "overrule with --loss.teacher.class-order" in said


def test_lines_of_imagenets_words_begin_with_the_class(tmp_path):
    path = tmp_path / "synsets.txt"
    path.write_text("".join(f"{wnid} some, words\n" for wnid in WNIDS[:3]))
    assert class_order(str(path), ["x"], (), count=3) == WNIDS[:3]


def test_a_class_map_may_be_json(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"0": "bee", "wasp": "bee", "2": "ant"}))
    found = class_map_for(str(path), ["a", "wasp", "c"], ["ant", "bee"], num_theirs=3)
    assert found is not None
    assert found.targets.tolist() == [1, 1, 0]
    for length in (5000, 200_000):  # the second is more than a field of a CSV may have
        path.with_suffix(".txt").write_text("x" * length)
        with pytest.raises(ConfigError, match=r"map.txt, line 1: expected the teacher's class.{,140}$"):
            class_map_for(str(path.with_suffix(".txt")), ["a"], ["ant", "bee"], num_theirs=1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.txt", None, "neither `natural` nor `sorted`, nor a file of class names"),
        ("short.txt", "a\nb\n", "that is 2 classes, the network knows 12"),
        ("twice.txt", "\n".join([*NUMBERS[:11], "0"]), "names several classes '0'"),
        ("gap.json", '{"0": "a", "2": "b"}', "between names and all ids from 0"),
        ("broken.json", "{", "nor a file of class names"),
    ],
)
def test_files_that_name_no_order_are_refused(numbered, weights, capsys, name, text, message):
    if text is not None:
        Path(name).write_text(text)
    done = run(capsys, *annotate_words(numbered, "labels", "--weights", weights[12], "--class-order", name))
    assert done.status == 2
    assert message in done.said


@pytest.mark.parametrize(
    "place", ["label_names", "pretrained_cfg", "ids", "by_name", "safetensors", "beside", "pth", "id2label"]
)
def test_names_that_come_with_the_weights_count(tmp_path, weights, capsys, monkeypatch, place):
    """The network knows the colours as cat, ant, bee; the folders sort as ant, bee, cat."""
    monkeypatch.chdir(tmp_path)
    names = ["cat", "ant", "bee"]
    write_images(Path("images"), names)
    model = network(3, [0, 1, 2])
    save_for_hf(model, "hub", model_config={"label_names": names}, safe_serialization=True)
    words, teacher = [], "local-dir:hub"
    config = json.loads(Path("hub/config.json").read_text())
    if place == "pretrained_cfg":
        config["pretrained_cfg"]["label_names"] = config.pop("label_names")
    elif place == "ids":
        config["label_names"] = dict(enumerate(names))
    elif place == "by_name":
        config["label_names"] = {"ant": 1, "bee": 2, "cat": 0}
    elif place == "safetensors":
        save_file(model.state_dict(), "file.safetensors", metadata={"class_names": json.dumps(names)})
        words, teacher = ["--weights", "file.safetensors"], NAME
    elif place in ("pth", "id2label"):
        by_id, by_name = dict(enumerate(names)), {"ant": 1, "bee": 2, "cat": 0}
        stated = {"class_to_idx": by_name} if place == "pth" else {"id2label": by_id}
        content = {"state_dict": model.state_dict(), **stated}
        torch.save(content, "file.pth")
        words, teacher = ["--weights", "file.pth"], NAME
    elif place == "beside":
        words, teacher = ["--weights", "hub/model.safetensors"], NAME
    Path("hub/config.json").write_text(json.dumps(config))
    done = run(capsys, *annotate_words("images", "labels", *words, teacher=teacher))
    assert (done.status, "assuming" in done.said) == (0, False)
    assert stored_top1("labels", sorted(names)) == 1
    assert LabelStore("labels").manifest.class_names == ("ant", "bee", "cat")
    done = run(capsys, *eval_words("images", *words, network=teacher))
    assert (done.status, done.top1, "assuming" in done.said) == (0, 1.0, False)
    done = run(capsys, *eval_words("images", *words, "--class-order", "sorted", network=teacher))
    assert "says itself that its classes are cat, ant, bee, not ant, bee, cat" in done.said


def test_names_of_another_number_are_said_and_not_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), ["ant", "bee", "cat"])
    save_for_hf(network(3, [0, 1, 2]), "hub", model_config={"label_names": ["x", "y"]}, safe_serialization=True)
    done = run(capsys, *eval_words("images", network="local-dir:hub"))
    assert "come with 2 class names (x, y) for 3 classes: not used" in done.said
    assert "assuming the model's 3 classes are the images'" in done.said


def test_a_file_of_1000_classes_is_taken_for_imagenet_and_said_so(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, folders = ["--weights", weights[1000]], [WNIDS[4], WNIDS[0], WNIDS[1]]  # colours 4, 0 and 1
    write_images(Path("images"), folders, colour_of=dict(zip(folders, (4, 0, 1), strict=True)))
    line = "1,000 classes are ImageNet's, by their number: 0 = n01440764, 1 = n01443537, 2 = n01484850"
    done = run(capsys, *annotate_words("images", "labels", *file, "--class-map", "names"))
    assert (done.status, f"assuming the teacher's {line}" in done.said) == (0, True)
    assert stored_top1("labels", sorted(folders)) == 1
    done = run(capsys, *eval_words("images", *file))
    assert (done.top1, f"assuming the model's {line}" in done.said) == (1.0, True)

    words = ["tench", "Goldfish", "hammerhead_shark"]  # of classes 0, 1 and 4
    write_images(Path("words"), words, colour_of=dict(zip(words, (0, 1, 4), strict=True)))
    done = run(capsys, *annotate_words("words", "by-words", *file, "--class-map", "names"))
    assert "called by WordNet's words: Goldfish = n01443537, hammerhead_shark = n01494475, tench = n" in done.said
    assert stored_top1("by-words", sorted(words)) == 1
    assert run(capsys, *eval_words("words", *file)).top1 == 1

    write_images(Path("few"), ["ant", "bee"])
    done = run(capsys, *annotate_words("few", "none", "--weights", weights[12], "--class-map", "names"))
    assert "the teacher knows no names (12 classes); name its classes with --class-order FILE" in done.said
    write_images(Path("others"), ["crane", "tench", "unicorn"])  # two cranes are in ImageNet
    done = run(capsys, *annotate_words("others", "none", *file, "--class-map", "names"))
    assert done.status == 2
    assert "'crane' is no class of the teacher, nor 1 more of 3 ('unicorn'); the teacher knows n01440764," in done.said


def test_other_classes_as_many_as_imagenets_are_refused(weights, capsys):
    assert class_map_for(None, WNIDS, [str(i) for i in range(1000)], num_theirs=1000) is None  # shards of `.cls`
    others = [f"class{i:03d}" for i in range(1000)]
    with pytest.raises(ConfigError, match=r"'n01440764' to the teacher and 'class000' .*`order` if .*--class-order"):
        class_map_for(None, WNIDS, others, num_theirs=1000, assumed=True)
    assert class_map_for("order", WNIDS, others, num_theirs=1000, assumed=True) is None
    assert "the teacher's class is the images', n01440764 = class000, n01443537 = class001" in capsys.readouterr().err
    teacher = load_teacher(NAME, TeacherConfig(teacher=NAME), CPU, weights=weights[1000])
    name_classes(teacher, "sorted", others)
    assert class_map_for(None, teacher.class_names, others, num_theirs=1000) is None


def write_tar(path: Path, numbers: list[int]) -> None:
    """Images as WebDataset keeps them, each of the colour and the class of a number."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            buffer = io.BytesIO()
            Image.new("RGB", (SIZE_PX, SIZE_PX), tuple(colours(27)[number].tolist())).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_class_numbers_are_ids_of_a_network_with_names(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("shard.tar"), [0, 3, 11])
    Path("list.txt").write_text("images/11/x.png 11\nimages/2/x.png 2\n")
    write_images(Path("images"), NUMBERS)  # folders of numbers, as ImageNet-V2's
    for images in ("shard.tar", "list.txt", "images"):
        done = run(capsys, *eval_words(images, "--weights", weights[1000]))
        assert (done.status, done.top1) == (0, 1.0)
        assert (
            "assuming the images' class numbers are ids of the model's 1,000 classes: 0 = n01440764, 1 = n0"
            in done.said
        )
    done = run(capsys, *annotate_words("shard.tar", "labels", "--weights", weights[1000], "--class-map", "names"))
    assert (done.status, "class numbers are ids of the teacher's 1,000" in done.said) == (0, True)
    store = LabelStore("labels")
    assert [int(store[f"{n:04d}.png"].dense()[0, 0].argmax()) for n in (0, 3, 11)] == [0, 3, 11]
    write_tar(Path("from-one.tar"), [1, 3])
    save_run("run", ["ant", "bee", "cat"])
    write_tar(Path("some.tar"), [0, 2])
    done = run(capsys, *eval_words("some.tar", network="run"))
    assert ("class numbers are ids of the model's 3" in done.said, "overrule" in done.said) == (True, False)
    done = run(capsys, *eval_words("from-one.tar", network="run"))
    assert "class numbers are ids from 0 to 2, these run to 3; the model knows ant, bee, cat" in done.said
    Path("unlabelled.txt").write_text("images/11/x.png\n")
    done = run(capsys, *eval_words("unlabelled.txt", network="run"))
    assert "unlabelled.txt: the images have no classes that answers could be held against" in done.said
    write_tar(Path("more.tar"), [26])
    Path("names.txt").write_text("\n".join(f"kind {i}" for i in range(12)))
    words = ["--weights", weights[12], "--class-order", "names.txt"]
    assert run(capsys, *annotate_words("unlabelled.txt", "named", *words)).status == 0
    assert LabelStore("named").manifest.class_names[11] == "kind 11"
    done = run(capsys, *annotate_words("unlabelled.txt", "none", "--weights", weights[12], "--class-order", "natural"))
    assert "the images have no classes; give a file of names" in done.said
    done = run(capsys, *eval_words("more.tar", "--weights", weights[12]))
    assert (done.status, "has 27 classes, the model 12 whose names it does not know" in done.said) == (2, True)


def save_run(folder: str, class_names: list[str], val: str | None = None) -> None:
    """A run whose network knows the colours in the order of its classes."""
    recipe = Recipe(
        data=DataConfig(train="nowhere", val=val),
        model=ModelConfig(name=NAME, img_size=(SIZE_PX, SIZE_PX)),
        optim=OptimConfig(lr=0.1, lr_batch_size=1),
        eval=EvalConfig(crop_fraction=1.0),
        epochs=1,
        batch_size=1,
    )
    model = create_model(NAME, num_classes=len(class_names), img_size=(SIZE_PX, SIZE_PX))
    assert isinstance(model, TimmAdapter)
    model.backbone.load_state_dict(network(len(class_names), list(range(len(class_names)))).state_dict())
    trained = TrainState(model, torch.optim.SGD(model.parameters()), None)
    save_checkpoint(Path(folder), 1, trained, recipe=recipe, class_names=class_names)


def test_a_run_labels_and_is_evaluated_on_its_classes_in_any_order(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run("run", NUMBERS)  # as a run on tar files has them
    write_images(Path("images"), NUMBERS)
    for labels, more in (("labels", []), ("by-name", ["--class-map", "names"])):
        done = run(capsys, *annotate_words("images", labels, *more, teacher="run"))
        assert (done.status, "assuming" in done.said) == (0, False)
        assert stored_top1(labels, sorted(NUMBERS)) == 1
    done = run(capsys, *annotate_words("images", "by-order", "--class-map", "order", teacher="run"))
    assert "WARNING: --class-map order: the teacher's class is the images', 0 = 0, 1 = 1, 2 = 10" in done.said
    assert run(capsys, *eval_words("images", network="run")).top1 == 1
    done = run(capsys, *eval_words("images", "--class-order", "sorted", network="run"))
    assert (done.status, "WARNING" in done.said) == (0, False)  # numbers alone are no names that it could contradict


def test_names_are_compared_in_one_unicode_form(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["café", "naïve"]
    apart = [unicodedata.normalize("NFD", name) for name in names]
    assert ids_among(apart, names) == ids_among(names, apart) == [0, 1]
    assert ids_among([names[0], apart[0]], [apart[0], names[0]]) == [1, 0]  # both there: as they are spelt
    save_run("run", names, val="apart")
    write_images(Path("apart"), apart)
    done = run(capsys, *annotate_words("apart", "labels", teacher="run"))
    assert (done.status, "assuming" in done.said) == (0, False)
    done = run(capsys, "eval", "run", "--device", "cpu", "--num-workers", "0", "--json")
    assert done.top1 == 1
    write_images(Path("images"), names)  # in the other form, into the same store
    done = run(capsys, *annotate_words("images", "labels", teacher="run"))
    assert done.status == 0
    for name, theirs in (
        ("Café", "'Caf\\xe9' looks like 'caf\\xe9'"),
        ("naïve\u200b", "'na\\xefve\\u200b' looks like"),
    ):
        write_images(Path(f"like-{name}"), [name])
        done = run(capsys, *eval_words(f"like-{name}", network="run"))
        assert (done.status, theirs in done.said) == (2, True)


def test_val_images_may_hold_some_of_the_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("train"), ["ant", "bee", "cat"])
    write_images(Path("val"), ["bee", "cat"], colour_of={"bee": 1, "cat": 2})
    write_images(Path("strange"), ["bee", "cow", "dog", "elk", "fox"])
    Path("recipe.yaml").write_text(
        f"model: {{name: {NAME}, img_size: [64, 64]}}\noptim: {{lr: 0.1, lr_batch_size: 2}}\nloss: {{beta: 0}}\n"
        "data: {train: train, num_workers: 0}\nnum_steps: 1\nbatch_size: 2\n"
    )
    train = ["train", "--recipe", "recipe.yaml", "--device", "cpu"]
    done = run(capsys, *train, "--out", "runs/some", "--data.val", "val")
    assert done.status == 0
    dataset = evaluation_set(load_run(Path("runs/some")).recipe, class_names=["ant", "bee", "cat"])
    assert [*dataset.source.keys] == ["bee/x.png", "cat/x.png"]
    assert dataset.source.class_ids.tolist() == [1, 2]
    done = run(capsys, *train, "--out", "runs/strange", "--data.val", "strange")
    assert done.status == 2
    assert (
        "strange: 'cow' is no class of the model, nor 3 more of 5 ('dog', 'elk', 'fox'); the model knows ant, "
        "bee, cat (3 classes)" in done.said
    )
    save_run("run", ["cat", "bee", "ant"])
    done = run(capsys, *train, "--out", "runs/tuned", "--model.weights", "run/checkpoints/00000001")
    assert done.status == 0
    assert "3 of 3 classes are initialised from its heads for 3, by name" in done.said  # not ant as cat


def test_training_from_a_file_without_names_says_whose_classes_its_rows_are_taken_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["k0", "k1", "k10", "k2"]
    write_images(Path("images"), names)
    tensors = network(4, [0, 1, 2, 3]).state_dict()
    torch.save(tensors, "plain.pth")
    torch.save({"state_dict": tensors, "class_names": ["k0", "k1", "k2", "k10"]}, "named.pth")
    torch.save({"state_dict": tensors, "class_names": ["k0", "k1"]}, "few.pth")
    train = ["train", "--recipe", "finetune", "--model.name", NAME, "--model.img-size", SIZE_PX, "--dry-run", "--out=a"]
    train += ["--data.train", "images", "--batch-size", "2", "--device", "cpu", "--model.weights"]
    for file in ("plain.pth", "few.pth"):
        said = run(capsys, *train, file).said
        assert f"WARNING: assuming {file}'s 4 classes are the images' in sorted order: 0 = k0, 1 = k1, 2 = k10" in said
        assert "in natural order, which timm's scripts train in, 2 is k2; class_names in the file would settle" in said
    said = run(capsys, *train, "named.pth").said
    assert "named.pth: 4 of 4 classes are initialised from its heads for 4, by name" in said
    assert "assuming" not in said


def test_ids_in_a_list_may_leave_some_out(tmp_path):
    (tmp_path / "val.csv").write_text("path,label\nbee/x.png,1\ncat/x.png,2\n")
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    source = open_images(tmp_path / "val.csv")
    assert as_classes_of(source, ["1", "2"], 2, "val.csv").class_ids.tolist() == [0, 1]
    with pytest.raises(DataError, match="'1' is no class of the model"):
        as_classes_of(source, ["2", "3"], 2, "val.csv")


def write_labels(folder: str, class_names: tuple[str, ...], classes: list[str]) -> None:
    """A store of one certain label a class, of the class of its place."""
    with LabelStoreWriter(folder, Manifest(num_classes=3, class_names=class_names, topk=1)) as writer:
        for place, name in enumerate(classes):
            writer.add(f"{name}/x.png", from_mask(np.array([[place]]), num_classes=3))


def test_labels_without_names_are_said_to_be_taken_in_order(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["ant", "bee", "cat"]
    source = ImageFolder(write_images(Path("images"), names))
    write_labels("unnamed", (), names)
    line = "assuming the labels' 3 classes are the images' in sorted order: 0 = ant, 1 = bee, 2 = cat"
    check_labels(source, LabelStore("unnamed"))
    assert line in capsys.readouterr().err
    assert line in run(capsys, "inspect", "unnamed", "--images", "images").said
    write_labels("named", ("ant", "bee", "cat"), names)
    check_labels(source, LabelStore("named"))
    assert "assuming" not in run(capsys, "inspect", "named", "--images", "images").said
    write_images(Path("others"), ["ant", "bee", "cow"])
    done = run(capsys, "inspect", "named", "--images", "others")
    assert "'cow' is no class of the labels; the labels know ant, bee, cat (3 classes)" in done.said
    write_labels("turned", ("cat", "bee", "ant"), names)
    with pytest.raises(DataError, match="class 0 is 'cat' to the labels and 'ant' to the images"):
        check_labels(source, LabelStore("turned"))
    assert "the images have 3" not in run(capsys, "merge", "named", "turned", "both").said


def test_masks_are_said_to_hold_the_images_classes_in_order(numbered, capsys):
    for place, name in enumerate(NUMBERS):
        Path("masks", name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), place, np.uint8)).save(Path("masks", name, "x.png"))
    done = run(capsys, "annotate", numbered, "labels", "--teacher", "masks:masks", "--device", "cpu")
    assert "WARNING: assuming the masks' 12 classes are the images' in sorted order: 0 = 0, 1 = 1, 2 = 10" in done.said
    Path("map.csv").write_text("".join(f"{name},{name}\n" for name in NUMBERS))
    words = ["annotate", numbered, "told", "--teacher", "masks:masks", "--class-map", "map.csv", "--device", "cpu"]
    assert "assuming" not in run(capsys, *words).said
    assert "assuming" not in run(capsys, "inspect", "labels", "--masks", "masks").said  # which these labels are
    Path("classes.txt").write_text("".join(f"class {name}\n" for name in NUMBERS))
    done = run(capsys, "annotate", numbered, "others", "--teacher", "masks:masks", "--device", "cpu")
    assert (done.status, "number the masks as these classes" in done.said) == (2, True)
    Path("classes.txt").write_text("".join(f"{name}\n" for name in sorted(NUMBERS)))
    done = run(capsys, "annotate", numbered, "listed", "--teacher", "masks:masks", "--device", "cpu")
    assert (done.status, "assuming" in done.said) == (0, False)
    assert stored_top1("told", sorted(NUMBERS)) == 1


def test_teachers_of_one_ensemble_are_compared(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["cat", "ant", "bee"]
    write_images(Path("images"), names)
    save_run("run", names)
    words = annotate_words("images", "labels", "--teacher", "run", "--weights", weights[3], "--weights", "")
    done = run(capsys, *words)
    assert done.status == 0
    assert f"assuming {NAME}'s 3 classes are the other teacher's in its order: 0 = cat, 1 = ant, 2 = bee" in done.said
    assert stored_top1("labels", sorted(names)) == 1
    save_run("other", ["cat", "cow", "bee"])
    done = run(capsys, *annotate_words("images", "none", "--teacher", "other", teacher="run"))
    assert (done.status, "cannot be averaged: cat, ant, bee against cat, cow, bee" in done.said) == (2, True)


def test_sets_of_imagenet_and_real_labels_are_for_models_of_its_classes(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), ["3", "7"])
    with pytest.raises(ValueError, match=r"this one's are others \(class000, class001, class002, \.\.\.\)"):
        SETS["imagenet-v2"](Path("images"), [f"class{i:03d}" for i in range(1000)], 1000)
    turned = SETS["imagenet-v2"](Path("images"), WNIDS[::-1], 1000)
    assert turned.source.class_ids.tolist() == [996, 992]
    birds = [WNIDS[11], WNIDS[13]]  # of ImageNet-A
    write_images(Path("birds"), birds)
    of_numbers = SETS["imagenet-a"](Path("birds"), [str(i) for i in range(1000)], 1000)  # a run on tar files
    assert of_numbers.competing is not None
    assert "assuming the model's 1,000 classes are ImageNet's" in capsys.readouterr().err
    assert (of_numbers.source.class_ids.tolist(), of_numbers.competing.sum()) == ([11, 13], 200)
    Path("real.json").write_text("[[1000]]")
    with pytest.raises(ValueError, match=r"real\.json: expected a list with a list of class ids, 0 to 999"):
        read_real_labels(Path("real.json"))
    Path("real.json").write_text("[[0]]")
    done = run(capsys, *eval_words("images", "--weights", weights[12], "--real", "real.json"))
    assert (done.status, "for models of ImageNet-1k's 1,000 classes" in done.said) == (2, True)


def test_names_with_commas_are_told_apart_where_several_are_listed():
    names = ("tench, Tinca tinca", "a,b", "bee", "cat")
    assert str(ClassList(4, names)) == '4 classes ("tench, Tinca tinca", a,b, bee, ...)'
    assert listed([*map(repr, names)]) == "'tench, Tinca tinca', 'a,b', 'bee', ..."  # no second quotes


@pytest.mark.parametrize("read", [read_json, read_class_names])
def test_json_nested_too_deeply_is_no_file_of_names(tmp_path, read):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json: .*recursion"):
        read(tmp_path / "deep.json")

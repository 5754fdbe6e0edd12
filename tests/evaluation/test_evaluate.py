from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, collate_score_maps
from tokenlabel.core.config import Inference
from tokenlabel.core.geometry import Box, View, stack_views
from tokenlabel.core.scores import from_mask
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, TokenTruth, object_tokens, observe
from tokenlabel.evaluation.masks import MaskFolder, agreement, mask_agreement
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import Outputs, TokenModel
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.errors import OutputError


class Oracle(TokenModel):
    """Says of each token what its top left pixel is (its red byte), and of the image what its first token is."""

    num_classes = 10
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def forward(self, images, plan=None):
        ids = (images[:, 0, ::4, ::4] * 255).round().long().clamp_max(9)  # [B, h, w]
        tokens = torch.nn.functional.one_hot(ids.flatten(1), 10).float()
        return Outputs(tokens[:, 0], tokens, torch.nn.Identity(), (ids.shape[1], ids.shape[2]))

    def grid_for(self, img_size):
        height_px, width_px = pair(img_size)
        return height_px // 4, width_px // 4

    def no_weight_decay(self):
        return set()

    def layers(self):
        return {}

    def set_grad_checkpointing(self, enable=True):
        pass

    def intermediates(self, images, layers):
        return []


def batch_of(masks, class_ids, score_maps=None):
    images = torch.from_numpy(np.stack(masks)).to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    views = torch.from_numpy(stack_views([View.identity()] * len(masks)))
    return Batch(
        images=images,
        class_ids=torch.tensor(class_ids),
        score_maps=collate_score_maps(score_maps) if score_maps else None,
        views=views,
        keys=[str(i) for i in range(len(masks))],
        num_classes=10,
        has_class=torch.ones(len(masks), dtype=torch.bool),
    )


def run(batches, model=None):
    evaluators = [Accuracy(), Calibration(), TokenTruth()]
    return observe(model or Oracle(), batches, {Inference.CLASS: evaluators})[Inference.CLASS]


def test_accuracy_counts_every_image_once():
    masks = [np.full((8, 8), c) for c in (3, 4, 5)]
    evaluation = run([batch_of(masks[:2], [3, 4]), batch_of(masks[2:], [0])])
    assert evaluation["num_images"] == 3
    assert evaluation["top1"] == pytest.approx(2 / 3)
    assert "token_accuracy" not in evaluation


def test_a_model_that_says_nothing_is_right_about_nothing():
    """All logits equal: ties count against the image's class, whatever its number."""

    class Mute(Oracle):
        def forward(self, images, plan=None):
            outputs = super().forward(images)
            return Outputs(outputs.class_logits * 0, outputs.tokens, outputs.token_head, outputs.grid)

    evaluation = run([batch_of([np.zeros((8, 8))] * 2, [0, 7])], Mute())
    assert (evaluation["top1"], evaluation["top5"]) == (0, 0)


@pytest.mark.parametrize("part", ["class_logits", "tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused_with_the_image(part, value):
    """All of them compare as neither larger nor smaller: class 0, or every class, would be the answer."""

    class Overflown(Oracle):
        def forward(self, images, plan=None):
            outputs = super().forward(images)
            getattr(outputs, part)[-1] = value
            return outputs

    masks = [np.full((8, 8), 3)] * 2
    truths = [from_mask(np.full((8, 8), 3, np.uint8), num_classes=10)] * 2
    with pytest.raises(OutputError, match=r"network for 1 images \(1\) are not finite in fp32; its weights"):
        run([batch_of(masks, [3, 3], truths)], Overflown())


def test_tokens_are_held_against_the_masks_where_an_object_is():
    truth = np.full((8, 8), 255, np.uint8)
    truth[:4, :4], truth[4:, 4:] = 3, 4  # two of four tokens show an object
    said = np.zeros((8, 8), np.uint8)
    said[:4, :4] = 3
    evaluation = run([batch_of([said], [0], [from_mask(truth, num_classes=10)])])
    assert evaluation["num_tokens_judged"] == 2
    assert evaluation["token_accuracy"] == 0.5


def test_a_token_shows_an_object_that_covers_a_quarter_of_it():
    mask = np.full((8, 8), 255, np.uint8)
    mask[:2, :2] = 6  # a quarter of the first of four tokens
    mask[4, 4] = 7  # a sixteenth of the last
    views = torch.from_numpy(stack_views([View.identity()]))
    targets = align(collate_score_maps([from_mask(mask, num_classes=10)]), views, (2, 2), samples=4)
    objects, classes = object_tokens(targets)
    assert objects[0].tolist() == [True, False, False, False]
    assert classes[0, 0] == 6


def test_a_teacher_agrees_with_itself():
    mask = np.random.default_rng(0).integers(0, 10, (8, 8)).astype(np.uint8)
    views = torch.from_numpy(stack_views([View.identity()]))
    targets = align(collate_score_maps([from_mask(mask, num_classes=10)]), views, (8, 8))
    assert agreement(targets, targets, 10) == (64, 64)


def test_maps_of_images_without_a_mask_are_not_judged(tmp_path, capsys):
    mask = np.random.default_rng(0).integers(1, 10, (8, 8)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    manifest = Manifest(num_classes=10, class_names=tuple("0123456789"), topk=1)
    with LabelStoreWriter(tmp_path / "labels", manifest) as writer:
        writer.add("a.jpg", from_mask(mask, num_classes=10))
        writer.add("b.jpg", from_mask(mask, num_classes=10))
    assert mask_agreement(LabelStore(tmp_path / "labels"), tmp_path) == 1.0
    assert "1 of 2 labelled images have a mask there" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no mask of any of 2 labelled images there \(a.jpg, b.jpg\); expected a.png"):
        mask_agreement(LabelStore(tmp_path / "labels"), tmp_path)


def test_what_a_teacher_did_not_see_is_not_held_against_it(tmp_path):
    """The middle half of an image in 4 x 4 cells, all of them right; class 0 is no answer."""
    mask = np.random.default_rng(0).integers(1, 10, (8, 8)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    middle = replace(from_mask(mask[2:6, 2:6], num_classes=10), region=Box(0.25, 0.25, 0.75, 0.75))
    manifest = Manifest(num_classes=10, class_names=tuple("0123456789"), topk=1)
    with LabelStoreWriter(tmp_path / "labels", manifest) as writer:
        writer.add("a.jpg", middle)
    assert mask_agreement(LabelStore(tmp_path / "labels"), tmp_path) == 1.0
    whole = torch.from_numpy(stack_views([View.identity()]))
    truth = align(collate_score_maps([from_mask(mask, num_classes=10)]), whole, (8, 8))
    guess = align(collate_score_maps([middle]), whole, (8, 8))
    right, judged = agreement(guess, truth, 10)
    assert right == judged
    assert 16 <= judged < 64


def test_masks_are_read_by_the_key_of_the_image(tmp_path):
    (tmp_path / "3").mkdir()
    mask = np.array([[1, 255], [2, 3]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "3" / "a.b.png")
    score_map = MaskFolder(tmp_path, num_classes=4)["3/a.b.jpg"]
    assert score_map.dense()[0, 0].tolist() == [0, 1, 0, 0]
    assert score_map.dense()[0, 1].tolist() == [0.25] * 4


def test_what_is_wrong_with_masks_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        MaskFolder(tmp_path / "none", num_classes=4)
    masks = MaskFolder(tmp_path, num_classes=4)
    with pytest.raises(ValueError, match=r"x\.png: the mask of x\.jpg cannot be read"):
        masks["x.jpg"]
    Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="one channel"):
        masks["x.jpg"]
    Image.fromarray(np.full((2, 2), 7, np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png.*expected 0 to 3"):
        masks["x.jpg"]
    (tmp_path / "own").mkdir()
    (tmp_path / "classes.txt").write_text("dog\ncat\n")  # the values 0 and 1 in the masks beside it
    MaskFolder(tmp_path / "own", num_classes=3).check(["dog", "cat", "cow"])
    with pytest.raises(ValueError, match=r"classes\.txt: class 0 is 'dog' to this file and 'cat' to the images"):
        MaskFolder(tmp_path / "own", num_classes=2).check(["cat", "dog"])

"""A step's targets and loss against the same worked out image by image, class by class, in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import aligned_point_by_point, dense_targets, draw_box, draw_view
from torch import nn

from tokenlabel.core.align import align, enough_samples, image_labels, softened
from tokenlabel.core.batch import Batch, collate_score_maps, normalize_images
from tokenlabel.core.config import (
    ClassTarget,
    ErasingConfig,
    Extent,
    Inference,
    LogitsMode,
    LossConfig,
    MixConfig,
    Mixing,
    OnlineTeacherConfig,
    TokenChoice,
)
from tokenlabel.core.erase import erase
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.losses import sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import MixPlan
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.scores import Kind, from_probabilities, from_top
from tokenlabel.core.step import (
    FOR_MODEL,
    Part,
    Supervision,
    Targets,
    TrainStep,
    make_targets,
    student_loss,
    top_score_maps,
)
from tokenlabel.core.step import draw_mix as draw_mix_plan
from tokenlabel.core.targets import class_targets
from tokenlabel.models import create_model
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch

NUM_IMAGES, GRID = 3, (2, 3)
seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)


@st.composite
def configs(draw, extents=tuple(Extent)):
    class_target = draw(st.sampled_from(ClassTarget))
    taught = class_target is not ClassTarget.TRUTH
    return LossConfig(
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        class_target=class_target,
        teacher_share=draw(shares),
        extent=draw(st.sampled_from(extents)),
        temperature=draw(st.sampled_from([1.0, 3.0])) if taught else 1.0,
        tokens=draw(st.sampled_from(TokenChoice)),
        token_threshold=draw(shares),
    )


def draw_batch(rng, num_classes=6, *, stored=True):
    """A batch of tiny images; its maps keep each cell's most probable classes, its views are of any kind."""
    maps = []
    for _ in range(NUM_IMAGES):
        height, width = rng.integers(1, 5, 2)
        probs = rng.dirichlet(np.full(num_classes, 0.5), (height, width))
        maps.append(from_probabilities(probs, int(rng.integers(1, 4)), region=draw_box(rng, 0.5)))
    views = [draw_view(rng, int(rng.integers(0, 3))) for _ in maps]
    return Batch(
        images=torch.from_numpy(rng.integers(0, 256, (NUM_IMAGES, 3, 12, 18), dtype=np.uint8)),
        class_ids=torch.from_numpy(rng.integers(0, num_classes, NUM_IMAGES)),
        num_classes=num_classes,
        views=torch.from_numpy(stack_views(views)),
        score_maps=collate_score_maps(maps) if stored else None,
        keys=[str(i) for i in range(NUM_IMAGES)],
        has_class=torch.ones(NUM_IMAGES, dtype=torch.bool),
    ), maps


def draw_mix(rng):
    mask = torch.from_numpy(rng.uniform(0, 1, (NUM_IMAGES, *GRID)).astype(np.float32))
    return MixPlan(mask, torch.from_numpy(rng.permutation(NUM_IMAGES)), on_tokens=True)


class FixedTeacher:
    """Says the same of every batch."""

    def __init__(self, rng, num_classes=6, grid=(3, 2)):
        self.of_images = rng.dirichlet(np.ones(num_classes), NUM_IMAGES)
        self.of_locations = rng.dirichlet(np.full(num_classes, 0.5), (NUM_IMAGES, *grid))

    def probabilities(self, images):
        return torch.from_numpy(self.of_images).float(), torch.from_numpy(self.of_locations).float()


# The oracle: one image after the other.


def plain_tokens(config, maps, batch):
    """Targets [B, N, C] and weights [B, N] of the tokens before smoothing and mixing."""
    samples = max(2, *(math.ceil(max(m.codes.shape[axis] for m in maps) / GRID[axis]) for axis in (0, 1)))
    all_targets, all_weights = [], []
    for i, score_map in enumerate(maps):
        frames = batch.views[i].numpy().astype(float)
        targets, weights = aligned_point_by_point(score_map, frames, GRID, samples)
        for n in range(len(weights)):
            if weights[n] == 0:
                continue
            probs = targets[n] / weights[n]
            counts = {TokenChoice.ALL: True, TokenChoice.CONFIDENT: probs.max() >= config.token_threshold}[
                config.tokens
            ]
            weights[n] *= counts
            targets[n] = probs * weights[n]
        all_targets.append(targets)
        all_weights.append(weights)
    return np.stack(all_targets), np.stack(all_weights)


def plain_labels(config, maps, batch):
    """The stores' one label of each image [B, C]."""
    labels = []
    for i, score_map in enumerate(maps):
        frames = batch.views[i].numpy().astype(float)
        if config.extent is Extent.IMAGE:
            frames = np.array([[[1.0, 0, 0], [0, 1, 0]]])
        samples = enough_samples(score_map.codes.shape[:2], (1, 1))
        target, weight = aligned_point_by_point(score_map, frames, (1, 1), samples)
        truth = np.eye(batch.num_classes)[int(batch.class_ids[i])]
        labels.append(target[0] / weight[0] if weight[0] > 0 else truth)
    return labels


def plain_class_targets(config, batch, labels):
    """What the class token learns [B, C], and at the temperature [B, C]; each times its weight."""
    share = {ClassTarget.TRUTH: 0.0, ClassTarget.TEACHER: 1.0, ClassTarget.BOTH: config.teacher_share}
    share = share[config.class_target]
    truths, lessons = [], []
    for i, label in enumerate(labels):
        truth = int(batch.class_ids[i])
        said = label ** (1 / config.temperature)
        said = said / said.sum()
        truths.append((1 - share) * np.eye(batch.num_classes)[truth])
        lessons.append(share * said)
    plain, warm = np.stack(truths), np.stack(lessons)
    return (plain + warm, 0 * warm) if config.temperature == 1 else (plain, warm)


def smooth_and_mix(targets, weights, shares, plan, smoothing):
    """Targets [B, N, C] after both; `shares` [B, N] of the partner."""
    smoothed = (1 - smoothing) * targets + smoothing * weights[..., None] / targets.shape[2]
    mixed = np.zeros_like(smoothed)
    for i in range(len(smoothed)):
        partner = smoothed[int(plan.partner[i])]
        for n in range(smoothed.shape[1]):
            mixed[i, n] = (1 - shares[i, n]) * smoothed[i, n] + shares[i, n] * partner[n]
    return mixed


def expected_class_targets(config, batch, labels, plan):
    area = plan.mask.double().mean(dim=(1, 2), keepdim=True)[..., 0].numpy()
    plain, warm = plain_class_targets(config, batch, labels)
    return [
        smooth_and_mix(part[:, None], part.sum(axis=1)[:, None], area, plan, config.label_smoothing)
        for part in (plain, warm)
    ]


def check(targets: Targets, expected, num_classes):
    names = ("class_token", "softened", "tokens")
    for name, wanted in zip(names, expected, strict=True):
        got = getattr(targets, name)
        if got is None:
            assert not np.any(wanted), name
        else:
            np.testing.assert_allclose(dense_targets(got, num_classes), wanted, atol=2e-5, err_msg=name)
            torch.testing.assert_close(
                got.weight.double(), dense_targets(got, num_classes).sum(dim=2), atol=2e-5, rtol=0
            )


@settings(max_examples=40)
@given(seeds, configs())
def test_targets_of_stored_maps_agree_image_by_image(seed, config):
    rng = np.random.default_rng(seed)
    batch, maps = draw_batch(rng)
    plan = draw_mix(rng)
    got = make_targets(batch, Supervision(loss=config, stored=True), GRID, mix=plan)
    labels = plain_labels(config, maps, batch)
    tokens, weights = plain_tokens(config, maps, batch)
    shares = plan.mask.double().flatten(1).numpy()
    tokens = smooth_and_mix(tokens, weights, shares, plan, config.label_smoothing)
    check(got, [*expected_class_targets(config, batch, labels, plan), tokens], batch.num_classes)


@settings(max_examples=30)
@given(seeds, configs(extents=(Extent.CROP,)), st.integers(1, 6))
def test_targets_of_a_teacher_in_the_step_agree_image_by_image(seed, config, topk):
    """Its maps lie on the augmented images; what these do not show of their source has no label."""
    config = dataclasses.replace(config, teacher=OnlineTeacherConfig(name="a", topk=topk))
    rng = np.random.default_rng(seed)
    batch, _ = draw_batch(rng, stored=False)
    teacher, plan = FixedTeacher(rng), draw_mix(rng)
    got = make_targets(batch, Supervision(loss=config, stored=False, teacher=teacher), GRID, mix=plan)
    maps = [map_of_best_classes(probs, topk) for probs in teacher.of_locations]
    labels = list(teacher.of_images)
    as_seen = torch.from_numpy(stack_views([View.identity()] * NUM_IMAGES))
    on_crops = dataclasses.replace(batch, views=torch.cat([batch.views, as_seen], dim=1))
    tokens, weights = plain_tokens(config, maps, on_crops)
    shares = plan.mask.double().flatten(1).numpy()
    tokens = smooth_and_mix(tokens, weights, shares, plan, config.label_smoothing)
    check(got, [*expected_class_targets(config, batch, labels, plan), tokens], batch.num_classes)


def map_of_best_classes(probs, topk):
    """The map [h, w, C] of one image in which every location keeps the classes that are best on average."""
    best = sorted(range(probs.shape[2]), key=lambda c: -probs[..., c].mean())[:topk]
    class_ids = np.broadcast_to(np.array(best), (*probs.shape[:2], len(best)))
    return from_top(class_ids, probs[..., best], num_classes=probs.shape[2])


def test_a_teacher_in_the_step_keeps_the_classes_it_is_asked_for():
    probs = torch.rand(2, 4, 5, 30).softmax(dim=3)
    assert top_score_maps(probs, 7).classes.shape == (2, 7)
    assert top_score_maps(probs, 99).classes.shape == (2, 30)
    complete = align(top_score_maps(probs, 30), torch.eye(2, 3).expand(2, 1, 2, 3), (4, 5), samples=1)
    torch.testing.assert_close(complete.dense(30), probs.flatten(1, 2))


def test_what_a_teacher_in_the_step_says_nothing_of():
    """Such an image keeps its class as label of its class token; its tokens have none."""
    rng = np.random.default_rng(0)
    teacher, (batch, _) = FixedTeacher(rng, grid=GRID), draw_batch(rng, stored=False)
    teacher.of_images[0], teacher.of_locations[0] = 0, 0
    config = LossConfig(
        label_smoothing=0, class_target=ClassTarget.TEACHER, teacher=OnlineTeacherConfig(name="a", topk=6)
    )
    targets = make_targets(batch, Supervision(loss=config, stored=False, teacher=teacher), GRID)
    said = targets.class_token.dense(6)[:, 0]
    assert said[0].tolist() == np.eye(6)[batch.class_ids[0]].tolist()
    np.testing.assert_allclose(said[1:], teacher.of_images[1:], atol=1e-6)
    assert targets.tokens is not None
    torch.testing.assert_close(targets.tokens.weight, torch.tensor([[0.0] * 6, [1.0] * 6, [1.0] * 6]))


def one_image(label, *, class_id=0, num_classes=3):
    """A batch of one image whose map says the same everywhere."""
    score_map = from_probabilities(np.array([[label]]), num_classes)
    return Batch(
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        class_ids=torch.tensor([class_id]),
        num_classes=num_classes,
        views=torch.from_numpy(stack_views([View.identity()])),
        score_maps=collate_score_maps([score_map]),
        keys=["a"],
        has_class=torch.tensor([True]),
    )


def targets_of(batch, **options):
    supervision = Supervision(loss=LossConfig(label_smoothing=0.0, **options), stored=True)
    made = make_targets(batch, supervision, (1, 2))
    assert made.tokens is not None
    return made.class_token.dense(3)[0, 0].tolist(), made.tokens.dense(3)[0, 0].tolist()


def test_hard_labels_are_the_most_probable_class():
    said, tokens = targets_of(one_image([0.2, 0.5, 0.3]), class_target=ClassTarget.TEACHER, hard=True)
    assert said == [0, 1, 0]
    assert tokens == pytest.approx([0.2, 0.5, 0.3], abs=1e-3)
    mixed, _ = targets_of(one_image([0.2, 0.5, 0.3]), class_target=ClassTarget.BOTH, teacher_share=0.25, hard=True)
    assert mixed == [0.75, 0.25, 0]


def test_a_crop_that_shows_nothing_the_teacher_saw_is_labelled_by_the_truth():
    batch = one_image([0.2, 0.5, 0.3], class_id=2)
    away = dataclasses.replace(batch, views=torch.from_numpy(stack_views([View.translation(2.0, 0.0)])))
    said, tokens = targets_of(away, class_target=ClassTarget.TEACHER)
    assert said == [0, 0, 1]
    assert tokens == [0, 0, 0]


def test_published_labels_of_logits_are_the_softmax_of_pooled_logits():
    """The mode `published` pools first (ReLabel does), the others take each cell's softmax first."""
    logits = np.array([[[4.0], [6.0]]], np.float32)  # [1, 2, 1]
    score_map = from_top(np.array([[[0], [1]]]), logits, num_classes=3, kind=Kind.LOGITS)
    maps, view = collate_score_maps([score_map]), torch.eye(2, 3).expand(1, 1, 2, 3)
    said = image_labels(maps, view, torch.tensor([0]), map_mode=LogitsMode.PUBLISHED)[0][0]
    torch.testing.assert_close(said, torch.tensor([4 / 2, 6 / 2, 0.0]).softmax(dim=0))
    other = image_labels(maps, view, torch.tensor([0]), map_mode=LogitsMode.KEPT)[0][0]
    torch.testing.assert_close(other, torch.tensor([0.5, 0.5, 0.0]))


@given(seeds, st.floats(0.5, 8))
def test_softening_divides_logits_by_the_temperature(seed, temperature):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (4, 5)))
    expected = (logits / temperature).softmax(dim=1)
    torch.testing.assert_close(softened(logits.softmax(dim=1), temperature), expected)
    certain = torch.eye(3)
    torch.testing.assert_close(softened(certain, temperature), certain)


def outputs_for(rng, num_classes=6):
    torch.manual_seed(int(rng.integers(2**31)))
    head = nn.Linear(4, num_classes)
    class_logits = torch.randn(NUM_IMAGES, num_classes, requires_grad=True)
    return Outputs(class_logits, torch.randn(NUM_IMAGES, GRID[0] * GRID[1], 4), head, GRID)


@settings(max_examples=20)
@given(seeds, st.floats(0.5, 5), shares)
def test_distillation_at_a_temperature_is_hintons_up_to_a_constant(seed, temperature, share):
    """Its gradient is that of (1 - share) * H(truth) + share * temperature**2 * KL(teacher, student)."""
    rng = np.random.default_rng(seed)
    batch, _ = draw_batch(rng, stored=False)
    teacher = FixedTeacher(rng)
    config = LossConfig(
        beta=0.0,
        label_smoothing=0.0,
        class_target=ClassTarget.BOTH,
        teacher_share=share,
        temperature=temperature,
        teacher=OnlineTeacherConfig(name="a"),
    )
    supervision, outputs = Supervision(loss=config, stored=False, teacher=teacher), outputs_for(rng)
    loss = student_loss(outputs, make_targets(batch, supervision, GRID), supervision)
    (got,) = torch.autograd.grad(loss.total, outputs.class_logits)
    z = outputs.class_logits
    teach = (torch.from_numpy(teacher.of_images).float().log() / temperature).softmax(dim=1)
    divergence = nn.functional.kl_div((z / temperature).log_softmax(1), teach, reduction="batchmean")
    truth = nn.functional.cross_entropy(z, batch.class_ids)
    (expected,) = torch.autograd.grad((1 - share) * truth + share * temperature**2 * divergence, z)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert float(loss.total.detach()) == pytest.approx(float(loss.class_part), rel=1e-5)


def test_the_default_is_the_papers_objective():
    """Ground truth for the class token, the aligned map for the others, beta .5."""
    rng = np.random.default_rng(0)
    batch, _ = draw_batch(rng)
    outputs, supervision = outputs_for(rng), Supervision(loss=LossConfig(), stored=True)
    loss = student_loss(outputs, make_targets(batch, supervision, GRID), supervision)
    assert batch.score_maps is not None
    expected = token_label_loss(
        outputs,
        class_targets(batch.class_ids).smoothed(0.1, 6),
        align(batch.score_maps, batch.views, GRID).smoothed(0.1, 6),
        beta=0.5,
    )
    assert torch.equal(loss.total, expected.total)


def test_without_beta_the_tokens_have_no_targets():
    batch, _ = draw_batch(np.random.default_rng(0))
    config = LossConfig(beta=0.0, class_target=ClassTarget.TEACHER)
    assert make_targets(batch, Supervision(loss=config, stored=True), GRID).tokens is None


def test_erased_tokens_lose_their_weight():
    batch, _ = draw_batch(np.random.default_rng(0))
    gone = torch.zeros(NUM_IMAGES, 12, 18, dtype=torch.bool)
    gone[:, :6, :6] = True  # the first of 2 x 3 tokens
    supervision = Supervision(loss=LossConfig(), stored=True)
    kept, whole = (make_targets(batch, supervision, GRID, erased=mask).tokens for mask in (gone, None))
    assert kept is not None
    assert whole is not None
    expected = whole.weight.clone()
    expected[:, 0] = 0
    torch.testing.assert_close(kept.weight, expected)


def test_a_step_is_its_stages_in_order():
    """Normalise, erase and draw, make targets, run the model, weigh the losses."""
    torch.manual_seed(0)
    batch, _ = draw_batch(np.random.default_rng(3))
    options = {"patch_size": 6, "depth": 1, "width": 16, "num_heads": 2, "stem_width": 4}
    model = create_model("lvvit_t", num_classes=6, img_size=(12, 18), **options).eval()
    supervision = Supervision(loss=LossConfig(), stored=True)
    mix_by = MixConfig(kind=Mixing.MIXTOKEN)
    for ignore in (False, True):
        erase_by = ErasingConfig(probability=1.0, area=(0.2, 0.3), ignore_erased=ignore)
        part, no_autocast = Part(0, 5, 0), torch.autocast("cpu", enabled=False)
        step = TrainStep(model, supervision, erasing=erase_by, mixing=mix_by, autocast=no_autocast)
        got = step(batch, part, Stopwatch())
        generator = part.generator()
        images, gone = erase(
            normalize_images(batch.images, mean=model.mean, std=model.std), erase_by, generator=generator
        )
        plan = draw_mix_plan(mix_by, NUM_IMAGES, GRID, (12, 18), generator=generator)
        targets = make_targets(batch, supervision, GRID, mix=plan, erased=gone if ignore else None)
        expected = student_loss(model(images, plan), targets, supervision)
        assert torch.equal(got["loss"], expected.total)
        assert torch.equal(got["token_loss"], expected.token_part)


def test_an_image_without_a_class_has_no_class_target_and_the_others_weigh_what_they_always_do():
    batch, _ = draw_batch(np.random.default_rng(0))
    half = dataclasses.replace(batch, has_class=torch.tensor([True, False, True]))
    supervision = Supervision(loss=LossConfig(), stored=True)
    got, whole = make_targets(half, supervision, GRID), make_targets(batch, supervision, GRID)
    assert got.class_token.weight[:, 0].tolist() == [1, 0, 1]
    assert not got.class_token.dense(6)[1].any()
    assert got.tokens is not None
    assert whole.tokens is not None
    assert torch.equal(got.tokens.dense(6), whole.tokens.dense(6))
    outputs = outputs_for(np.random.default_rng(1))
    known = class_targets(batch.class_ids[[0, 2]]).smoothed(0.1, 6)
    expected = sparse_cross_entropy(outputs.class_logits[[0, 2]][:, None], known).sum() / 3
    torch.testing.assert_close(student_loss(outputs, got, supervision).class_part, expected.detach())


def test_tokens_may_be_about_other_classes_than_the_class_token():
    """Each part is smoothed over its own classes, and trains its own head."""
    batch, _ = draw_batch(np.random.default_rng(0), num_classes=40)
    batch = dataclasses.replace(batch, class_ids=torch.tensor([0, 1, 2]), num_classes=3)
    supervision = Supervision(loss=LossConfig(), stored=True)
    targets = make_targets(batch, supervision, GRID)
    assert targets.tokens is not None
    assert batch.score_maps is not None
    plain = align(batch.score_maps, batch.views, GRID)
    torch.testing.assert_close(targets.tokens.dense(40), plain.smoothed(0.1, 40).dense(40))
    torch.testing.assert_close(targets.class_token.dense(3).sum(dim=2), torch.ones(3, 1))
    model = create_model("resnet10t", num_classes=3, num_token_classes=40, img_size=(64, 96))
    outputs = model(torch.randn(NUM_IMAGES, 3, 64, 96))
    assert (outputs.class_logits.shape[1], outputs.token_logits.shape[2]) == (3, 40)
    assert outputs.grid == GRID
    student_loss(outputs, targets, supervision).total.backward()
    with pytest.raises(ValueError, match="tokens are about 40 classes, the class token about 3"):
        outputs.logits(Inference.COMBINED)


def test_a_teacher_sees_images_before_they_are_erased_and_mixed():
    seen = []

    class Watching(FixedTeacher):
        def probabilities(self, images):
            seen.append(images)
            return super().probabilities(images)

    rng = np.random.default_rng(0)
    batch, _ = draw_batch(rng, stored=False)
    gone = torch.ones(NUM_IMAGES, 12, 18, dtype=torch.bool)
    config = LossConfig(teacher=OnlineTeacherConfig(name="a"))
    make_targets(
        batch, Supervision(loss=config, stored=False, teacher=Watching(rng)), GRID, mix=draw_mix(rng), erased=gone
    )
    assert len(seen) == 1
    assert torch.equal(seen[0], batch.images)


def test_stored_labels_label_the_tokens_beside_a_teacher_for_the_class():
    rng = np.random.default_rng(0)
    batch, _ = draw_batch(rng)
    teacher = FixedTeacher(rng)
    config = LossConfig(label_smoothing=0.0, class_target=ClassTarget.TEACHER, teacher=OnlineTeacherConfig(name="a"))
    got = make_targets(batch, Supervision(loss=config, stored=True, teacher=teacher), GRID)
    np.testing.assert_allclose(got.class_token.dense(6)[:, 0], teacher.of_images, atol=1e-6)
    assert batch.score_maps is not None
    assert got.tokens is not None
    torch.testing.assert_close(got.tokens.dense(6), align(batch.score_maps, batch.views, GRID).dense(6))


def test_targets_that_nobody_can_give_are_refused():
    with pytest.raises(ConfigError, match=r"class_target teacher needs a teacher.*data\.labels"):
        Supervision(loss=LossConfig(class_target=ClassTarget.TEACHER), stored=False)
    teacher = FixedTeacher(np.random.default_rng(0))
    of_images = LossConfig(class_target=ClassTarget.BOTH, extent=Extent.IMAGE)
    with pytest.raises(ConfigError, match="sees the crop only"):
        Supervision(loss=of_images, stored=True, teacher=teacher)
    with pytest.raises(ConfigError, match="nothing to say"):
        Supervision(loss=LossConfig(), stored=True, teacher=teacher)
    with pytest.raises(ConfigError, match="nothing to say"):
        Supervision(loss=LossConfig(beta=0.0), stored=False, teacher=teacher)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_share": 1.5}, r"loss\.teacher_share"),
        ({"label_smoothing": -0.1}, r"loss\.label_smoothing"),
        ({"temperature": 0.0}, r"loss\.temperature"),
        ({"beta": -1.0}, r"loss\.beta"),
        ({"hard": True, "temperature": 2.0, "class_target": ClassTarget.BOTH}, "nothing to soften"),
        ({"hard": True}, r"loss\.class_target"),
        ({"temperature": 2.0}, r"loss\.class_target"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        LossConfig(**options)


def test_a_teacher_that_keeps_no_class_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.teacher\.topk must be at least 1, got 0"):
        OnlineTeacherConfig(topk=0)


@pytest.mark.parametrize("options", [{"class_map": "names"}, {"weights": "a.pth"}, {"name": "a", "outside": "spread"}])
def test_options_of_a_teacher_that_have_no_effect_are_refused(options):
    with pytest.raises(ConfigError, match=r"(class_map|weights) is of a teacher|loss\.teacher\.class_map leaves out"):
        OnlineTeacherConfig(**options)


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, True),
        ({"beta": 0.0}, False),
        ({"beta": 0.0, "class_target": ClassTarget.TEACHER}, True),
        ({"beta": 0.0, "class_target": ClassTarget.TEACHER, "teacher": OnlineTeacherConfig(name="a")}, False),
    ],
)
def test_a_store_is_read_only_where_it_is_used(options, reads):
    assert LossConfig(**options).reads_labels is reads


def test_a_model_draws_other_numbers_than_erasing_and_mixing():
    """Else the first images to be mixed would be those that drop path drops."""
    part = Part(seed=3, step=5, start=8)
    torch.manual_seed(part.random_seed(purpose=FOR_MODEL))
    assert not torch.equal(torch.rand(8), torch.rand(8, generator=part.generator()))
    assert part.random_seed(2) == Part(seed=3, step=5, start=10).random_seed()

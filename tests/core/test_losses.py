from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_cases import TensorSizes, dense_targets, draw_box, draw_score_map, draw_targets, draw_view
from loss_ranks import ModelWithLoss, gradients, gradients_of_ranks
from torch import distributed as dist
from torch import nn

from tokenlabel.core import kernels
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.config import Mixing
from tokenlabel.core.geometry import stack_views
from tokenlabel.core.losses import linear_cross_entropy, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import mix_targets, sample_mix
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.models import create_model

seeds = st.integers(0, 2**32 - 1)
counts = st.sampled_from([2, 10, 1000])


def draw_logits(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()


def dense_loss(logits, dense):
    """The soft cross entropy of each token against dense targets (times weight), in float64."""
    z = logits.double()
    log_probs = z - torch.log(torch.exp(z - z.amax(dim=2, keepdim=True)).sum(dim=2, keepdim=True))
    log_probs = log_probs - z.amax(dim=2, keepdim=True)
    return -(dense * log_probs).sum(dim=2)


def assert_equal_in_value_and_gradient(logits, targets, *, tolerance=1e-6):
    num_classes = logits.shape[2]
    upstream = torch.rand(logits.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, expected = (sparse_cross_entropy(logits, targets), dense_loss(logits, dense_targets(targets, num_classes)))
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    (grad,) = torch.autograd.grad(got, logits, upstream.to(got.dtype))
    (expected_grad,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(grad.double(), expected_grad.double(), atol=tolerance, rtol=tolerance)


@given(seeds, st.integers(1, 3), st.integers(1, 5), counts, st.integers(1, 20))
def test_equals_the_dense_soft_cross_entropy(seed, num_images, num_tokens, num_classes, num_entries):
    """Padded palettes, coverage weights, batches of one; K up to C."""
    rng = np.random.default_rng(seed)
    targets = draw_targets(
        rng, (num_images, num_tokens), num_classes, num_entries=num_entries, weighted=bool(rng.integers(2))
    )
    if rng.integers(2):
        targets = targets.smoothed(0.1, num_classes)
    assert_equal_in_value_and_gradient(draw_logits(seed, num_images, num_tokens, num_classes), targets)


@given(seeds, counts, st.sampled_from(Mixing), st.booleans(), st.sampled_from(["1", "some", "all"]))
def test_equals_the_dense_form_on_the_whole_path(seed, num_classes, mixing, per_sample, kept):
    """Score maps, views with lost corners, smoothing and mixing, as training chains them."""
    rng, grid = np.random.default_rng(seed), (3, 2)
    most = min(num_classes, 12)
    topk = {"1": 1, "some": min(3, most), "all": most}[kept]
    maps = [draw_score_map(rng, num_classes, topk=topk, region=draw_box(rng, 0.7)) for _ in range(3)]
    views = torch.from_numpy(stack_views([draw_view(rng, 2) for _ in maps]))
    plan = sample_mix(
        mixing, 3, grid=grid, img_size=(12, 16), per_sample=per_sample, generator=torch.Generator().manual_seed(seed)
    )
    targets = align(collate_score_maps(maps), views, grid).smoothed(0.1, num_classes)
    logits = draw_logits(seed, 3, 6, num_classes)
    assert_equal_in_value_and_gradient(logits, mix_targets(targets, plan, grid), tolerance=2e-6)
    classes = mix_targets(class_targets(torch.tensor([0, 1, num_classes - 1])), plan, (1, 1))
    assert_equal_in_value_and_gradient(logits[:, :1], classes, tolerance=2e-6)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_certain_targets_give_the_ordinary_cross_entropy(num_classes):
    logits, class_ids = draw_logits(0, 4, 1, num_classes), torch.tensor([0, 1, 1, num_classes - 1])
    for epsilon in (0.0, 0.1):
        got = sparse_cross_entropy(logits, class_targets(class_ids).smoothed(epsilon, num_classes))
        expected = nn.functional.cross_entropy(logits[:, 0], class_ids, reduction="none", label_smoothing=epsilon)
        torch.testing.assert_close(got[:, 0], expected, atol=1e-6, rtol=1e-6)


def test_gradcheck():
    targets = draw_targets(np.random.default_rng(0), (2, 3), 5, weighted=True)
    assert torch.autograd.gradcheck(lambda z: sparse_cross_entropy(z, targets), draw_logits(0, 2, 3, 5))


def test_tokens_without_weight_carry_neither_loss_nor_gradient():
    targets = TokenTargets(
        classes=torch.tensor([[1]]),
        excess=torch.tensor([[[0.9], [0.0]]]),
        floor=torch.tensor([[0.02, 0.0]]),
        weight=torch.tensor([[1.0, 0.0]]),
    )
    logits = draw_logits(0, 1, 2, 5)
    loss = sparse_cross_entropy(logits, targets)
    assert float(loss[0, 1].detach()) == 0
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().max() == 0
    assert logits.grad[0, 0].abs().max() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_logits_are_summed_in_float32(dtype, tolerance):
    """The loss of the rounded logits is exact; only the gradient is rounded to their dtype."""
    targets = draw_targets(np.random.default_rng(0), (2, 5), 1000, weighted=True)
    logits = draw_logits(0, 2, 5, 1000, dtype=dtype)
    loss = sparse_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    expected = dense_loss(exact, dense_targets(targets, 1000))
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), exact)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-4, rtol=tolerance)


def test_large_logits_do_not_overflow():
    targets = draw_targets(np.random.default_rng(0), (1, 2), 10)
    logits = (1e4 * draw_logits(0, 1, 2, 10, dtype=torch.float32)).detach().requires_grad_()
    loss = sparse_cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), dense_loss(logits, dense_targets(targets, 10)), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("block_size", [1, 700, 1 << 20])
def test_blocks_do_not_change_the_result(block_size, monkeypatch):
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", block_size)
    targets = draw_targets(np.random.default_rng(1), (7, 4), 50, weighted=True)
    assert_equal_in_value_and_gradient(draw_logits(1, 7, 4, 50), targets)


def test_under_autocast_the_loss_stays_in_float32():
    targets = draw_targets(np.random.default_rng(0), (2, 3), 20)
    logits = draw_logits(0, 2, 3, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sparse_cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), dense_loss(logits, dense_targets(targets, 20)), atol=1e-5, rtol=1e-5)


def test_nothing_of_the_size_of_the_logits_is_made_but_their_gradient(monkeypatch):
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", 2 * 49 * 1000)
    targets = draw_targets(np.random.default_rng(0), (16, 49), 1000)
    logits = draw_logits(0, 16, 49, 1000, dtype=torch.float32)
    with TensorSizes() as made:
        loss = sparse_cross_entropy(logits, targets).mean()
    assert made.largest <= 2 * 49 * 1000  # one block
    with TensorSizes() as made:
        loss.backward()
    assert sum(made_size == logits.numel() for made_size in made.fresh) == 1
    assert max(size for size in made.fresh if size < logits.numel()) <= 2 * 49 * 1000


def draw_head(seed, width, num_classes, *, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(width, num_classes, bias=bias, dtype=dtype)


def assert_fused_equals_unfused(tokens, head, targets, *, tolerance):
    watched = [tokens, *head.parameters()]
    got, expected = (linear_cross_entropy(tokens, head, targets), sparse_cross_entropy(head(tokens), targets).mean())
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(1.7 * got, watched)
    for gradient, unfused in zip(gradients, torch.autograd.grad(1.7 * expected, watched), strict=True):
        torch.testing.assert_close(gradient, unfused, atol=tolerance, rtol=tolerance)


@given(seeds, st.integers(1, 3), st.integers(1, 5), counts, st.booleans(), st.booleans())
def test_the_fused_head_equals_head_and_loss(seed, num_images, num_tokens, num_classes, bias, weighted):
    targets = draw_targets(np.random.default_rng(seed), (num_images, num_tokens), num_classes, weighted=weighted)
    tokens = draw_logits(seed, num_images, num_tokens, 8)
    head = draw_head(seed, 8, num_classes, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.BLOCK_SIZE, "cpu", num_tokens * num_classes * (1 + seed % 2))
        assert_fused_equals_unfused(tokens, head, targets, tolerance=1e-10)


def test_the_fused_head_in_float32():
    targets = draw_targets(np.random.default_rng(0), (4, 9), 1000)
    tokens = draw_logits(0, 4, 9, 32, dtype=torch.float32)
    assert_fused_equals_unfused(tokens, draw_head(0, 32, 1000, dtype=torch.float32), targets, tolerance=1e-5)


def test_the_fused_head_under_autocast():
    """As near to float32 as the unfused form is, and with gradients in the parameters' dtype."""
    targets = draw_targets(np.random.default_rng(0), (4, 9), 1000, weighted=True)
    tokens, head = draw_logits(0, 4, 9, 32, dtype=torch.float32), draw_head(0, 32, 1000, dtype=torch.float32)
    watched = [tokens, head.weight, head.bias]
    exact = sparse_cross_entropy(head(tokens), targets).mean()
    exact_gradients = torch.autograd.grad(exact, watched)
    with torch.autocast("cpu", torch.bfloat16):
        fused = linear_cross_entropy(tokens, head, targets)
        unfused = sparse_cross_entropy(head(tokens), targets).mean()  # after it: the head's gradient must not get lost
    torch.testing.assert_close(fused, unfused, atol=1e-5, rtol=1e-5)
    gradients, unfused_gradients = torch.autograd.grad(fused, watched), torch.autograd.grad(unfused, watched)
    for gradient, other, expected in zip(gradients, unfused_gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 1.2 * (other - expected).norm() + 1e-7


@pytest.mark.parametrize("size", [16.0, 1000.0])
def test_the_fused_head_in_half_precision_sums_many_tokens_without_overflow(monkeypatch, size):
    """8,192 tokens with features of 16 that all miss class 3: the weight's gradient sums to 131,072 on the way."""
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", 1 << 20)
    head = draw_head(0, 4, 8, dtype=torch.float32)
    tokens = torch.full((8, 1024, 4), size).requires_grad_()
    nothing = torch.zeros(8, 1024)
    targets = TokenTargets(torch.full((8, 1), 3), torch.ones(8, 1024, 1), nothing, nothing + 1)
    watched = [tokens, *head.parameters()]
    expected = torch.autograd.grad(linear_cross_entropy(tokens, head, targets), watched)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(tokens, head, targets)
    for gradient, exact in zip(torch.autograd.grad(1024 * loss, watched), expected, strict=True):
        assert (gradient - 1024 * exact).norm() < 0.01 * (1024 * exact).norm()


def test_the_fused_head_accumulates_gradients():
    """Two half batches, each divided by two, leave the gradient of the whole batch; backward twice leaves it twice."""
    targets, head = draw_targets(np.random.default_rng(0), (4, 3), 7), draw_head(0, 5, 7)
    tokens = draw_logits(0, 4, 3, 5).detach()
    (linear_cross_entropy(tokens, head, targets)).backward()
    assert head.weight.grad is not None
    whole = head.weight.grad.clone()
    head.zero_grad()
    for half in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        (linear_cross_entropy(tokens[half], head, targets.of_images(half)) / 2).backward()
    torch.testing.assert_close(head.weight.grad, whole)
    loss = linear_cross_entropy(tokens, head, targets)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 3 * whole)


def test_the_fused_head_without_gradients():
    targets, head = draw_targets(np.random.default_rng(0), (4, 3), 7), draw_head(0, 5, 7)
    tokens = draw_logits(0, 4, 3, 5)
    with torch.no_grad():
        loss = linear_cross_entropy(tokens, head, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(tokens, head, targets).detach())


def test_the_fused_head_under_distributed_data_parallel(tmp_path):
    """The head is used outside of the wrapped forward; its gradient must be reduced all the same, step by step."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(6, 4), nn.Linear(4, 9)

        def forward(self, images):
            tokens = self.trunk(images)
            return Outputs(self.head(tokens.mean(dim=1)), tokens, self.head, grid=(1, 3))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = Model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        images, targets = torch.rand(2, 3, 6), draw_targets(np.random.default_rng(0), (2, 3), 9)
        on_class, parameters = class_targets(torch.tensor([1, 2])), list(model.parameters())
        for _ in range(2):
            expected = torch.autograd.grad(token_label_loss(model(images), on_class, targets).total, parameters)
            wrapped.zero_grad()
            token_label_loss(wrapped(images), on_class, targets).total.backward()
            torch.testing.assert_close([p.grad for p in parameters], list(expected))
    finally:
        dist.destroy_process_group()


def test_two_ranks_end_with_the_gradient_of_the_whole_batch(tmp_path):
    """Also with the batch accumulated from two parts; `forward` returns the loss, so the head is inside of it."""
    expected = gradients(ModelWithLoss(), torch.arange(4))
    for of_rank in gradients_of_ranks(tmp_path):
        for got in of_rank:
            torch.testing.assert_close(got, expected)


def test_the_fused_head_never_holds_all_logits(monkeypatch):
    num_images, num_tokens, width, num_classes = 8, 49, 16, 1000
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", num_tokens * num_classes)
    targets = draw_targets(np.random.default_rng(0), (num_images, num_tokens), num_classes)
    tokens = draw_logits(0, num_images, num_tokens, width, dtype=torch.float32)
    head = draw_head(0, width, num_classes, dtype=torch.float32)
    with TensorSizes() as made:
        linear_cross_entropy(tokens, head, targets).backward()
    assert made.largest == num_tokens * num_classes


def test_the_objective_is_fused_where_logits_outgrow_features(monkeypatch):
    """Both ways lead to the same numbers; large logits are not made whole."""
    rng, num_classes = np.random.default_rng(0), 500
    on_class, on_tokens = draw_targets(rng, (6, 1), num_classes), draw_targets(rng, (6, 8), num_classes)
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", 8 * num_classes)
    linear = draw_head(0, 4, num_classes)
    wrapped = nn.Sequential(linear)  # not a bare linear layer
    largest, results = [], []
    for head in (linear, wrapped):
        outputs = Outputs(draw_logits(0, 6, num_classes), draw_logits(1, 6, 8, 4), head, grid=(2, 4))
        with TensorSizes() as made:
            loss = token_label_loss(outputs, on_class, on_tokens)
        largest.append(made.largest)
        watched = [outputs.class_logits, outputs.tokens, linear.weight, linear.bias]
        results.append([loss.total.detach(), *torch.autograd.grad(loss.total, watched)])
    torch.testing.assert_close(results[0], results[1])
    assert largest[0] < 6 * 8 * num_classes <= largest[1]


def test_the_objective_is_the_class_part_plus_beta_times_the_token_part():
    rng = np.random.default_rng(0)
    head = nn.Linear(4, 6).double()
    outputs = Outputs(draw_logits(0, 3, 6), draw_logits(1, 3, 5, 4), head, grid=(1, 5))
    on_class, on_tokens = draw_targets(rng, (3, 1), 6), draw_targets(rng, (3, 5), 6, weighted=True)
    loss = token_label_loss(outputs, on_class, on_tokens, beta=0.7)
    class_part = dense_loss(outputs.class_logits[:, None], dense_targets(on_class, 6)).sum() / 3
    token_part = dense_loss(head(outputs.tokens), dense_targets(on_tokens, 6)).sum() / (3 * 5)
    torch.testing.assert_close(loss.class_part, class_part.detach())
    torch.testing.assert_close(loss.token_part, token_part.detach())
    torch.testing.assert_close(loss.total, class_part + 0.7 * token_part)
    watched = [outputs.class_logits, outputs.tokens, head.weight, head.bias]
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, watched), torch.autograd.grad(class_part + 0.7 * token_part, watched)
    )


def test_beta_is_a_half_unless_said_otherwise():
    rng = np.random.default_rng(0)
    outputs = Outputs(draw_logits(0, 2, 6), draw_logits(1, 2, 4, 3), nn.Linear(3, 6).double(), grid=(2, 2))
    loss = token_label_loss(outputs, draw_targets(rng, (2, 1), 6), draw_targets(rng, (2, 4), 6))
    torch.testing.assert_close(loss.total.detach(), loss.class_part + 0.5 * loss.token_part)


def test_without_token_labels_only_the_class_counts():
    outputs = Outputs(draw_logits(0, 2, 6), draw_logits(1, 2, 4, 3), nn.Linear(3, 6).double(), grid=(2, 2))
    loss = token_label_loss(outputs, draw_targets(np.random.default_rng(0), (2, 1), 6), None)
    torch.testing.assert_close(loss.total.detach(), loss.class_part)
    assert float(loss.token_part) == 0


def test_two_ranks_are_one():
    """The mean over halves of a batch is the mean over the batch, whatever the weights."""
    targets = draw_targets(np.random.default_rng(0), (4, 3), 6, weighted=True)
    outputs = Outputs(draw_logits(0, 4, 6), draw_logits(1, 4, 3, 2), nn.Linear(2, 6).double(), grid=(1, 3))

    def part(rows):
        some = Outputs(outputs.class_logits[rows], outputs.tokens[rows], outputs.token_head, outputs.grid)
        chosen = targets.of_images(torch.arange(4)[rows])
        return token_label_loss(some, class_targets(torch.tensor([0, 1, 2, 3])[rows]), chosen).total

    torch.testing.assert_close((part(slice(0, 2)) + part(slice(2, 4))) / 2, part(slice(0, 4)))


def test_targets_of_another_grid_are_refused():
    targets = draw_targets(np.random.default_rng(0), (2, 4), 6)
    with pytest.raises(ValueError, match=r"outputs of \(2, 9\) .* targets of \(2, 4\)"):
        sparse_cross_entropy(draw_logits(0, 2, 9, 6), targets)


@pytest.mark.parametrize(("name", "options"), [("lvvit_t", {"depth": 1}), ("resnet10t", {})])
def test_models_of_many_classes_are_trained_through_the_fused_head(monkeypatch, name, options):
    taken = []

    def fused(tokens, head, targets):
        taken.append(head)
        return linear_cross_entropy(tokens, head, targets)

    monkeypatch.setattr("tokenlabel.core.losses.linear_cross_entropy", fused)
    model = create_model(name, num_classes=1000, img_size=(64, 64), **options)
    outputs = model(torch.zeros(2, 3, 64, 64))
    num_tokens = outputs.tokens.shape[1]
    targets = draw_targets(np.random.default_rng(0), (2, num_tokens), 1000)
    token_label_loss(outputs, class_targets(torch.zeros(2, dtype=torch.int64)), targets)
    assert taken == [outputs.token_head]


def test_class_ids_beyond_the_logits_are_refused():
    targets = class_targets([0, 7])  # which know no number of classes
    with pytest.raises(ValueError, match="class ids run from 0 to 7, expected them from 0 to 3"):
        sparse_cross_entropy(torch.zeros(2, 1, 4), targets)
    with pytest.raises(ValueError, match="class ids run from 0 to 7, expected them from 0 to 3"):
        linear_cross_entropy(torch.zeros(2, 1, 8), nn.Linear(8, 4), targets)
    with pytest.raises(ValueError, match="class ids run from 0 to 7, expected them from 0 to 3"):
        targets.dense(4)


def test_targets_over_other_classes_or_on_another_grid_are_refused():
    """Sums that fit by accident would train on wrong numbers: 10 classes' floors under 20 logits, (h, w) as (w, h)."""
    targets = replace(class_targets([1, 2], num_classes=10), grid=(1, 1))
    with pytest.raises(ValueError, match="logits over 20 classes, targets over 10"):
        sparse_cross_entropy(torch.zeros(2, 1, 20), targets)
    with pytest.raises(ValueError, match="logits over 20 classes, targets over 10"):
        linear_cross_entropy(torch.zeros(2, 1, 4), nn.Linear(4, 20), targets)
    tokens = TokenTargets(torch.zeros(2, 1).long(), torch.ones(2, 6, 1), torch.zeros(2, 6), torch.ones(2, 6), 3, (2, 3))
    outputs = Outputs(torch.zeros(2, 10), torch.zeros(2, 6, 8), nn.Linear(8, 3), grid=(3, 2))
    with pytest.raises(ValueError, match=r"grid of \(2, 3\) tokens .* outputs on \(3, 2\)"):
        token_label_loss(outputs, torch.tensor([0, 1]), tokens)


def test_a_model_without_class_head_takes_class_ids_that_it_has_no_use_for():
    """As a batch of images without classes holds them: zeros."""
    outputs = Outputs(torch.zeros(2, 0), torch.randn(2, 4, 8), nn.Linear(8, 3), grid=(2, 2))
    tokens = class_targets([1, 2], num_classes=3)
    tokens = TokenTargets(tokens.classes, torch.ones(2, 4, 1), torch.zeros(2, 4), torch.ones(2, 4), num_classes=3)
    loss = token_label_loss(outputs, torch.zeros(2, dtype=torch.long), tokens)
    assert loss.class_part == 0
    assert loss.total == 0.5 * loss.token_part

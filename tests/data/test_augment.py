import io
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.transforms_factory import transforms_imagenet_eval
from torch.nn import functional as F
from torchvision.transforms import functional as vision

from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.scores import from_mask
from tokenlabel.data import decoding
from tokenlabel.data.augment import EvalTransform, TrainTransform, draw_crop, one_view
from tokenlabel.data.config import AugmentConfig, ColourJitter, Interpolation, Order, WarpConfig
from tokenlabel.data.randaugment import COLOURS, WARPS, RandAugment, parse_randaugment
from tokenlabel.data.resampling import MEAN_COLOUR, resize, warp
from tokenlabel.runtime.errors import ConfigError

fast = settings(max_examples=40, deadline=None)

SIZES = st.sampled_from([(40, 40), (90, 35), (31, 77), (64, 48)])  # (width, height)
WARPED = WarpConfig(probability=1, degrees=40, shear=0.3, translate=0.2)


def noise(size_px, seed=0):
    width, height = size_px
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(size_px, seed=0):
    """Return smooth random colours, as natural images have them."""
    return noise((9, 7), seed).resize(size_px, Image.Resampling.BICUBIC)


def ramps(size_px):
    """Return an image whose red is x, whose green is y (255 at the far edge), and whose blue is 0."""
    width, height = size_px
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to((np.arange(height)[:, None] + 0.5) / height, (height, width))
    return Image.fromarray((np.stack([x, y, 0 * x], axis=2) * 255).round().astype(np.uint8))


def pixel_centres(size_px):
    """Return the centres [height, width, 2] of the pixels of an image of (height, width), in fractions."""
    height, width = size_px
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x, y], axis=2)


def inner(covered, radius):
    """Return the places all of whose neighbours up to a radius are covered, too."""
    side = 2 * radius + 1
    padded = np.pad(covered, radius, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side)).all(axis=(2, 3))


def off_edges(view, points):
    """Say which points lie on no edge of a frame, where rounding decides whether they are covered."""
    on_the_way = np.einsum("fij,hwj->hwfi", view.frames[:, :, :2], points) + view.frames[:, :, 2]
    return (np.abs(np.abs(on_the_way - 0.5) - 0.5) > 1e-4).all(axis=(2, 3))


class Geometric(TrainTransform):
    """RandAugment with nothing but its geometric operations, three an image."""

    def __init__(self, config, size_px):
        super().__init__(config, size_px)
        self._randaugment = RandAugment(weights=dict.fromkeys(WARPS, 1.0), num_ops=3, probability=1, magnitude_std=3)


CONFIGS = {
    "crop": AugmentConfig(crop_scale=(0.2, 1), horizontal_flip=0),
    "flips": AugmentConfig(crop_scale=(0.2, 1), vertical_flip=0.5),
    "warp": AugmentConfig(crop_scale=(0.3, 1), vertical_flip=0.5, warp=WARPED),
    "warp before the crop": AugmentConfig(crop_scale=(0.3, 1), warp=WARPED, order=Order.BEFORE_CROP),
}


class TestViewsAreExact:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
    @pytest.mark.parametrize("transform_class", [TrainTransform, Geometric])
    @given(image_size_px=SIZES, size_px=st.sampled_from([(32, 32), (24, 56)]), seed=st.integers(0, 999))
    @settings(max_examples=12, deadline=None)
    def test_each_pixel_shows_the_place_that_the_view_names(
        self, transform_class, config, image_size_px, size_px, seed
    ):
        transform = transform_class(config, size_px)
        pixels, view = transform(ramps(image_size_px), np.random.default_rng(seed))
        assert pixels.shape == (*size_px, 3)
        centres = pixel_centres(size_px)
        places, covered = view.to_source(centres), view.covers(centres) & off_edges(view, centres)
        source_px = 1 / np.array(image_size_px)
        output_px = np.abs(view.matrix[:, :2]) @ (1 / np.array(size_px[::-1]))
        if config.order is Order.BEFORE_CROP:  # the crop's resampling mixes the fill with its neighbours
            half = 0.5 / np.array(size_px[::-1])
            for corner in ((-1, -1), (1, -1), (-1, 1), (1, 1)):  # a sliver of fill may miss every centre
                covered &= view.covers(centres + half * corner)
            covered = inner(covered, int(2 + 2.5 * (source_px / output_px).max()))
        assume(covered.sum() >= 20)  # several warps may leave next to nothing
        off = np.abs(pixels[..., :2] / 255 - places)[covered]
        # Resampling repeats the edge of what it reads, so a ramp is off by up to a coarser pixel there.
        coarser_px = np.maximum(output_px, source_px)
        assert (off < 2 / 255 + 0.7 * coarser_px).all()
        assert (np.median(off, axis=0) < 1.5 / 255).all()

    @given(image_size_px=SIZES, size_px=st.sampled_from([(32, 32), (24, 56)]), seed=st.integers(0, 999))
    @fast
    def test_pixels_have_the_mean_colour_exactly_where_the_view_covers_nothing(self, image_size_px, size_px, seed):
        transform = Geometric(AugmentConfig(warp=WARPED, interpolation=Interpolation.BILINEAR), size_px)
        pixels, view = transform(Image.new("RGB", image_size_px), np.random.default_rng(seed))
        centres = pixel_centres(size_px)
        covered, decided = view.covers(centres), off_edges(view, centres)
        assert (pixels[covered & decided] == 0).all()
        assert (pixels[~covered & decided] == MEAN_COLOUR).all()

    def test_rotating_there_and_back_loses_the_corners_and_nothing_else(self):
        pixels = np.array(photo((80, 50)))
        view = one_view([View.rotation(30, img_size=(50, 80)), View.rotation(-30, img_size=(50, 80))])
        shown, covered = warp(pixels, view, Interpolation.BICUBIC), view.covers(pixel_centres((50, 80)))
        np.testing.assert_array_equal(shown[covered], pixels[covered])
        assert (shown[~covered] == MEAN_COLOUR).all()
        assert not covered[[0, 0, -1, -1], [0, -1, 0, -1]].any()
        assert covered[15:35, 25:55].all()

    def test_the_whole_image_is_shown_when_nothing_is_cut_or_warped(self):
        config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1.6, 1.6), horizontal_flip=0)
        image = photo((80, 50))
        pixels, view = TrainTransform(config, (50, 80))(image, np.random.default_rng(0))
        np.testing.assert_array_equal(pixels, np.asarray(image))
        np.testing.assert_allclose(view.frames, View.identity().frames)


def labelled_image(size_px, seed):
    """Return an image in red, green and blue patches, and the score map that calls these classes 0, 1 and 2."""
    width, height = size_px
    patches = np.random.default_rng(seed).integers(0, 3, (4, 5), dtype=np.uint8)
    mask = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST))
    return Image.fromarray(np.eye(3, dtype=np.uint8)[mask] * 255), from_mask(mask, num_classes=3)


def cell_means(values, grid):
    """Return the mean [N, ...] of pixels [height, width, ...] over each token's cell."""
    height, width = values.shape[:2]
    rows, columns = grid
    cells = values.reshape(rows, height // rows, columns, width // columns, -1).mean(axis=(1, 3))
    return cells.reshape(rows * columns, -1)


class TestLabelsFollowPixels:
    """The colour of a pixel is its class, so a token's label must be the mean colour of its cell."""

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
    @pytest.mark.parametrize("transform_class", [TrainTransform, Geometric])
    @given(image_size_px=SIZES, seed=st.integers(0, 999))
    @settings(max_examples=10, deadline=None)
    def test_aligned_labels_are_the_mean_colours_of_the_cells(self, transform_class, config, image_size_px, seed):
        size_px, grid = (32, 56), (4, 7)
        image, score_map = labelled_image(image_size_px, seed)
        pixels, view = transform_class(config, size_px)(image, np.random.default_rng(seed))
        views = torch.from_numpy(stack_views([view]))
        targets = align(collate_score_maps([score_map]), views, grid, samples=8)
        covered = view.covers(pixel_centres(size_px))
        expected = cell_means(pixels / 255 * covered[..., None], grid)
        off = np.abs(targets.dense(3)[0].numpy() - expected)
        assert off.mean() < 0.02
        assert off.max() < 0.16
        np.testing.assert_allclose(targets.weight[0], cell_means(covered, grid)[:, 0], atol=0.04)

    def test_tokens_that_show_nothing_of_the_image_have_weight_0(self):
        _, score_map = labelled_image((60, 40), 0)
        view = one_view([View.translation(0.5, 0)])
        targets = align(collate_score_maps([score_map]), torch.from_numpy(stack_views([view])), (2, 4))
        assert targets.weight[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
        assert (targets.dense(3)[0, [0, 1, 4, 5]] == 0).all()

    def test_a_crop_of_the_top_right_corner_has_the_labels_of_the_top_right_corner(self):
        quadrants = np.array([[0, 1], [2, 3]]).repeat(20, axis=0).repeat(40, axis=1)  # 80 x 40 px
        score_maps = collate_score_maps([from_mask(quadrants, num_classes=4)])
        transform = TrainTransform(AugmentConfig(crop_scale=(0.02, 0.1), horizontal_flip=0), (16, 16))
        seen = set()
        for seed in range(60):
            _, view = transform(Image.new("RGB", (80, 40)), np.random.default_rng(seed))
            corners = view.to_source(np.array([[0.0, 0], [1, 1]]))
            if ((corners[0] > 0.5) != (corners[1] > 0.5)).any():
                continue  # lies in two quadrants
            right, below = corners[0] > 0.5
            targets = align(score_maps, torch.from_numpy(stack_views([view])), (2, 2))
            assert targets.dense(4)[0].argmax(dim=1).tolist() == [2 * below + right] * 4
            seen.add((bool(right), bool(below)))
        assert len(seen) == 4


class TestCrop:
    @given(
        image_size_px=st.tuples(st.integers(1, 300), st.integers(1, 300)),
        scale=st.floats(0.01, 1),
        ratio=st.floats(0.3, 3),
        seed=st.integers(0, 99),
    )
    @fast
    def test_it_lies_inside_the_image_and_has_the_area_and_shape_asked_for(self, image_size_px, scale, ratio, seed):
        width, height = image_size_px
        rng = np.random.default_rng(seed)
        crop = draw_crop(image_size_px, scale=(scale, scale), ratio=(ratio, ratio), rng=rng)
        left, top, crop_width, crop_height = crop
        assert left >= 0
        assert top >= 0
        assert 1 <= crop_width <= width - left
        assert 1 <= crop_height <= height - top
        asked_width = (scale * width * height * ratio) ** 0.5
        if round(asked_width) <= width and 0 < round(asked_width / ratio) <= height and round(asked_width) > 0:
            assert (crop_width, crop_height) == (round(asked_width), round(asked_width / ratio))

    def test_every_place_and_size_is_drawn(self):
        rng = np.random.default_rng(0)
        crops = np.array([draw_crop((100, 60), scale=(0.2, 1), ratio=(0.5, 2), rng=rng) for _ in range(2000)])
        areas = crops[:, 2] * crops[:, 3] / 6000
        assert areas.min() < 0.22
        assert areas.max() > 0.9
        assert crops[:, 0].min() == 0
        assert (crops[:, 0] + crops[:, 2]).max() == 100
        assert (crops[:, 2] / crops[:, 3]).min() < 0.55

    def test_the_mean_colour_fills_like_timms(self):
        assert tuple(min(255, round(255 * mean)) for mean in (0.485, 0.456, 0.406)) == MEAN_COLOUR


@given(
    image_size_px=st.tuples(st.integers(20, 400), st.integers(20, 400)),
    side_px=st.sampled_from([32, 48]),
    crop_fraction=st.sampled_from([0.875, 0.9, 1.0]),
)
@fast
def test_evaluation_shows_the_pixels_of_timms(image_size_px, side_px, crop_fraction):
    image = photo(image_size_px)
    timms = np.asarray(
        transforms_imagenet_eval(side_px, crop_pct=crop_fraction, interpolation="bicubic", use_prefetcher=True)(image)
    )
    pixels, view = EvalTransform((side_px, side_px), crop_fraction=crop_fraction)(image, np.random.default_rng(0))
    off = np.abs(pixels.transpose(2, 0, 1).astype(int) - timms)
    assert off.max() <= 3
    assert off.mean() < 0.3
    assert view.covers(pixel_centres((side_px, side_px))).all()


@given(image_size_px=SIZES, size_px=st.sampled_from([(32, 32), (24, 56), (40, 18)]))
@fast
def test_evaluation_pixels_show_the_places_that_the_view_names(image_size_px, size_px):
    pixels, view = EvalTransform(size_px)(ramps(image_size_px), np.random.default_rng(0))
    places = view.to_source(pixel_centres(size_px))
    assert np.abs(pixels[..., :2] / 255 - places)[3:-3, 3:-3].max() < 2 / 255


class TestRandAugment:
    SIGNS = pytest.mark.parametrize("sign", [1, -1])

    def timms(self, name, magnitude, sign, image):
        hparams = {"img_mean": MEAN_COLOUR, "interpolation": Image.Resampling.BICUBIC, "magnitude_max": 10}
        with patch.object(auto_augment, "_randomly_negate", lambda value: sign * value):
            return np.asarray(auto_augment.AugmentOp(name, 1.0, magnitude, hparams)(image))

    @SIGNS
    @pytest.mark.parametrize("name", COLOURS)
    def test_changes_of_colour_make_timms_pixels(self, name, sign):
        image = photo((50, 40))
        for magnitude in (0, 2.5, 5, 9, 9.9, 10):
            ours = np.asarray(COLOURS[name](sign * magnitude / 10)(image))
            if "Posterize" in name and (magnitude < 2.5 or magnitude == 10) and (ours == 0).all():
                continue  # no bits are left, which timm would refuse
            np.testing.assert_array_equal(ours, self.timms(name, magnitude, sign, image))

    @SIGNS
    @pytest.mark.parametrize("name", WARPS)
    def test_geometric_operations_make_timms_pixels(self, name, sign):
        image = photo((50, 40))
        for magnitude in (0, 2.5, 9, 10):
            view = WARPS[name](sign * magnitude / 10, (image.size[1], image.size[0]))
            ours = warp(np.array(image), one_view([view]), Interpolation.BICUBIC)
            off = np.abs(ours.astype(int) - self.timms(name, magnitude, sign, image))
            assert np.quantile(off, 0.999) <= 1  # the last bit of a coordinate may decide about a border pixel

    @pytest.mark.parametrize(
        "name",
        [
            "rand-m9-mstd0.5-inc1",
            "rand-n3-m9-mstd0.5-inc1",
            "rand",
            "rand-inc0-p0.7-m15-mmax20",
            "rand-m7-mstd101",
            "rand-t3a-n1",
            "rand-m6-t3aw",
            "rand-tweights-n4",
        ],
    )
    def test_names_mean_what_they_mean_to_timm(self, name):
        ours, timms = parse_randaugment(name), auto_augment.rand_augment_transform(name, {})
        op = timms.ops[0]
        assert list(ours.weights) == [op.name for op in timms.ops]
        assert (ours.num_ops, ours.replace) == (timms.num_layers, timms.choice_weights is None)
        assert (ours.magnitude, ours.probability) == (op.magnitude, op.prob)
        assert (ours.magnitude_std, ours.max_magnitude) == (op.magnitude_std, op.magnitude_max or 10)
        if timms.choice_weights is not None:
            shares = np.array(list(ours.weights.values()))
            np.testing.assert_allclose(shares / shares.sum(), timms.choice_weights)

    def test_the_early_weights_leave_out_posterize_and_invert(self):
        plain, increasing = parse_randaugment("rand-w0"), parse_randaugment("rand-inc1-w0")
        assert len(plain.weights) == len(increasing.weights) == 13
        assert not plain.replace
        assert (plain.weights["Color"], increasing.weights["ColorIncreasing"]) == (0.025, 0.025)

    def test_uniform_magnitudes_can_be_asked_for_by_name(self):
        assert parse_randaugment("rand-mstdinf") == parse_randaugment("rand-mstd101")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("augmix-m3", "begins with 'rand-'"),
            ("rand-m9-msd0.5", "'msd0.5'; did you mean mstd"),
            ("rand-q3", "no option 'q3'; there are m, n, p"),
            ("rand-m9-tweigths", "did you mean weights"),
            ("rand-m", "expected m followed by a number"),
            ("rand-m9.5", "expected m followed by a number"),
            ("rand-m9-m8", "twice"),
            ("rand-w0-t3a", "give one of them"),
            ("rand-t3aw-n20", "20 different operations of only 14"),
            ("rand-", "no option ''"),
        ],
    )
    def test_other_names_are_refused_with_the_near_one(self, name, message):
        with pytest.raises(ConfigError, match=message):
            AugmentConfig(randaugment=name)

    def test_operations_are_drawn_as_often_as_asked(self):
        rng = np.random.default_rng(0)
        policy = parse_randaugment("rand-n2-p0.5-m9-inc1")
        drawn = [policy.draw(rng, img_size=(20, 30)) for _ in range(600)]
        assert np.mean([len(d.warps) + len(d.colours) for d in drawn]) == pytest.approx(1, abs=0.1)
        assert np.mean([len(d.warps) for d in drawn]) == pytest.approx(5 / 15, abs=0.07)
        assert max(len(d.warps) for d in drawn) == 2

    def test_magnitudes_vary_as_asked(self):
        rng = np.random.default_rng(0)

        def degrees(name):
            policy = parse_randaugment(name)
            rotation = RandAugment(
                weights={"Rotate": 1},
                magnitude=policy.magnitude,
                magnitude_std=policy.magnitude_std,
                max_magnitude=policy.max_magnitude,
                num_ops=1,
                probability=1,
            )
            views = [rotation.draw(rng, img_size=(30, 30)).warps[0] for _ in range(400)]
            return np.array([np.degrees(np.arcsin(view.matrix[1, 0])) for view in views])

        assert sorted(set(degrees("rand-m9").round(3))) == [-27, 27]
        noisy = np.abs(degrees("rand-m9-mstd0.5"))
        assert noisy.std() == pytest.approx(1.5, abs=0.3)
        assert noisy.max() <= 30.001
        assert np.abs(degrees("rand-m9-mstd0.5-mmax12")).max() > 30.5
        uniform = np.abs(degrees("rand-m9-mstdinf"))
        assert uniform.max() < 27
        assert uniform.mean() == pytest.approx(13.5, abs=1.5)


class TestColours:
    def augmented(self, image, seed=0, **options):
        config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0, **options)
        return TrainTransform(config, image.size[::-1])(image, np.random.default_rng(seed))[0]

    @pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation", "hue"])
    def test_jitter_makes_torchvisions_pixels_for_a_factor_in_its_range(self, kind):
        image = photo((24, 24))
        adjust = getattr(vision, f"adjust_{kind}")
        jitter = {
            "brightness": ColourJitter(brightness=0.4),
            "contrast": ColourJitter(contrast=0.4),
            "saturation": ColourJitter(saturation=0.4),
            "hue": ColourJitter(hue=0.4),
        }[kind]
        factors = np.linspace(-0.4, 0.4, 801) + (0 if kind == "hue" else 1)
        possible = np.stack([np.asarray(adjust(image, factor)) for factor in factors]).astype(int)
        for seed in range(4):
            pixels = self.augmented(image, seed, jitter=jitter)
            assert not np.array_equal(pixels, np.asarray(image))
            assert np.abs(possible - pixels).max(axis=(1, 2, 3)).min() <= 1

    def test_jitter_changes_the_asked_share_of_images(self):
        image = photo((8, 8))
        jitter = ColourJitter(brightness=0.5, probability=0.3)
        changed = [not np.array_equal(self.augmented(image, s, jitter=jitter), np.asarray(image)) for s in range(200)]
        assert np.mean(changed) == pytest.approx(0.3, abs=0.1)

    def test_three_augment_turns_grey_solarizes_or_blurs(self):
        image = photo((24, 24))
        before = np.asarray(image, int)
        kinds = []
        for seed in range(60):
            pixels = self.augmented(image, seed, three_augment=True).astype(int)
            if (pixels == pixels[..., :1]).all():
                kinds.append("grey")
            elif np.array_equal(pixels, np.asarray(ImageOps.solarize(image))):
                kinds.append("solarized")
            else:
                assert np.abs(np.diff(pixels, axis=0)).max() <= np.abs(np.diff(before, axis=0)).max()
                kinds.append("blurred")
        assert min(kinds.count(kind) for kind in ("grey", "solarized", "blurred")) > 8

    def test_colours_leave_the_view_alone(self):
        config = AugmentConfig(three_augment=True, jitter=ColourJitter(brightness=0.3, hue=0.1))
        image = photo((50, 40))
        _, plain = TrainTransform(AugmentConfig(), (32, 32))(image, np.random.default_rng(5))
        _, coloured = TrainTransform(config, (32, 32))(image, np.random.default_rng(5))
        np.testing.assert_array_equal(plain.frames, coloured.frames)


class TestTransforms:
    FULL = AugmentConfig(
        warp=WARPED, randaugment="rand-m9-mstd0.5-inc1", three_augment=True, jitter=ColourJitter(contrast=0.3)
    )

    @pytest.mark.parametrize("order", list(Order))
    def test_a_sample_is_a_function_of_its_random_state(self, order):
        config = AugmentConfig(**{**self.FULL.__dict__, "order": order})
        transform = pickle.loads(pickle.dumps(TrainTransform(config, (24, 32))))
        image = photo((50, 40))
        first, view = transform(image, np.random.default_rng(3))
        again, same_view = transform(image, np.random.default_rng(3))
        other, _ = transform(image, np.random.default_rng(4))
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(view.frames, same_view.frames)
        assert not np.array_equal(first, other)
        assert first.flags.writeable

    @pytest.mark.parametrize("interpolation", [Interpolation.BILINEAR, Interpolation.BICUBIC])
    def test_the_interpolation_is_the_one_asked_for(self, interpolation):
        config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), horizontal_flip=0, interpolation=interpolation)
        image = noise((40, 40))
        pixels, _ = TrainTransform(config, (24, 24))(image, np.random.default_rng(0))
        expected = F.interpolate(
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(),
            size=(24, 24),
            mode=interpolation.value,
            antialias=True,
        )
        assert (
            np.abs(expected[0].permute(1, 2, 0).clamp(0, 255).numpy() - pixels).max() <= 3
        )  # torch's bicubic kernel is another

    @pytest.mark.parametrize("interpolation", [Interpolation.BILINEAR, Interpolation.BICUBIC])
    @given(image_size_px=SIZES, size_px=SIZES, seed=st.integers(0, 99))
    @settings(max_examples=15, deadline=None)
    def test_resized_pixels_are_within_a_level_of_pillows(self, interpolation, image_size_px, size_px, seed):
        image = photo(image_size_px, seed)
        pillows = np.asarray(image.resize(size_px, Image.Resampling[interpolation.name]))
        off = np.abs(resize(np.asarray(image).copy(), size_px[::-1], interpolation).astype(int) - pillows)
        assert np.quantile(off, 1 if interpolation is Interpolation.BILINEAR else 0.995) <= 1

    @pytest.mark.parametrize("quality", [60, 95])
    def test_a_sample_is_the_same_with_simplejpeg_and_without(self, quality, monkeypatch):
        transform = TrainTransform(self.FULL, (32, 48))
        for seed in range(5):
            buffer = io.BytesIO()
            photo((70, 50), seed).save(buffer, "JPEG", quality=quality)
            samples = []
            for decoder in (decoding.simplejpeg, None):
                monkeypatch.setattr(decoding, "simplejpeg", decoder)
                pixels = decoding.decode_pixels(buffer.getvalue(), "a.jpg")
                samples.append(transform(pixels, np.random.default_rng(seed)))
            (fast, view), (slow, same_view) = samples
            assert np.abs(fast.astype(int) - slow).max() <= 1
            np.testing.assert_array_equal(view.frames, same_view.frames)

    def test_random_interpolation_draws_both(self):
        image = noise((40, 40))
        options = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "horizontal_flip": 0}
        transform = TrainTransform(AugmentConfig(**options), (24, 24))
        assert len({transform(image, np.random.default_rng(seed))[0].tobytes() for seed in range(12)}) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two numbers"),
            ({"crop_scale": (0.5, 1.2)}, "crop_scale must be above 0 and at most 1"),
            ({"crop_ratio": (0, 1)}, "crop_ratio must be two numbers"),
            ({"horizontal_flip": 1.5}, "horizontal_flip must be at least 0 and at most 1"),
            ({"jitter": ColourJitter(hue=0.7)}, r"hue must be at least 0 and at most 0\.5"),
        ],
    )
    def test_impossible_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            AugmentConfig(**options)

    def test_evaluation_refuses_random_interpolation_and_empty_crops(self):
        with pytest.raises(ValueError, match="bilinear or bicubic"):
            EvalTransform((8, 8), interpolation=Interpolation.RANDOM)
        with pytest.raises(ValueError, match="crop_fraction must be above 0"):
            EvalTransform((8, 8), crop_fraction=0.0)

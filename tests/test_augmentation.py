import math

import pytest
import torch

from apt_hooks import AptError, ZoomOutRotate
from apt_hooks.method.augmentation import Placement, covered_at


def placement(scale=1.0, angle=0.0, chosen=(True,)):
    batch = len(chosen)
    return Placement(torch.full((batch,), scale), torch.full((batch,), angle), torch.tensor(chosen))


def square(height, width, centre, side):
    """A mask, [1, height, width], with a square of ones; `centre` in pixel edges, (down, right)."""
    mask = torch.zeros(1, height, width)
    top, left = (int(c - side / 2) for c in centre)
    mask[:, top : top + side, left : left + side] = 1.0
    return mask


def centroid(mask):
    """(up, right) of the middle of the picture, in pixels."""
    height, width = mask.shape[-2:]
    rows = height / 2 - (torch.arange(height) + 0.5)
    columns = (torch.arange(width) + 0.5) - width / 2
    total = mask.sum()
    return float((mask * rows[:, None]).sum() / total), float((mask * columns).sum() / total)


def test_the_same_generator_state_gives_the_same_placement():
    draws = [ZoomOutRotate().draw(torch.full((4,), 0.5), torch.Generator().manual_seed(3)) for _ in range(2)]
    for name in ("scales", "angles", "chosen"):
        assert torch.equal(getattr(draws[0], name), getattr(draws[1], name))


def test_the_numbers_of_a_sample_do_not_depend_on_the_probabilities():
    generator = torch.Generator().manual_seed(3)
    draws = [ZoomOutRotate().draw(p, generator.manual_seed(3)) for p in (torch.zeros(4), torch.ones(4))]
    assert torch.equal(draws[0].scales, draws[1].scales)
    assert torch.equal(draws[0].angles, draws[1].angles)


def test_a_generator_of_ones_own_leaves_torchs_stream_alone():
    state = torch.get_rng_state()
    ZoomOutRotate()(torch.zeros(2, 1, 8, 8), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_scales_and_angles_fill_their_ranges_and_stay_inside():
    drawn = ZoomOutRotate((1.5, 2.5), 20.0).draw(torch.ones(2000), torch.Generator().manual_seed(0))
    assert drawn.scales.aminmax() == pytest.approx((1.5, 2.5), abs=0.01)
    assert drawn.angles.aminmax() == pytest.approx((-20.0, 20.0), abs=0.2)
    assert 1.5 <= drawn.scales.min() <= drawn.scales.max() <= 2.5
    assert -20.0 <= drawn.angles.min() <= drawn.angles.max() <= 20.0


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.8, 1.0])
def test_samples_are_chosen_as_often_as_their_probability_says(probability):
    drawn = ZoomOutRotate().draw(torch.full((4000,), probability), torch.Generator().manual_seed(1))
    # Four standard deviations; none at 0 and 1, which have to be exact.
    tolerance = 4 * math.sqrt(probability * (1 - probability) / 4000)
    assert float(drawn.chosen.float().mean()) == pytest.approx(probability, abs=tolerance)


def test_a_sample_that_is_not_chosen_stays_bit_for_bit():
    content = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    original = content.clone()
    moved = placement(2.0, 10.0, (False, True, False)).apply(content, 0.0)
    assert torch.equal(moved[[0, 2]], original[[0, 2]])
    assert not torch.equal(moved[1], original[1])
    assert torch.equal(content, original)


def test_where_no_sample_is_chosen_the_input_itself_comes_back():
    content = torch.randn(2, 1, 8, 8)
    assert placement(2.0, 10.0, (False, False)).apply(content, 0.0) is content


@pytest.mark.parametrize("fill", [-1.0, torch.tensor([0.25, -0.5, 3.0])], ids=["one value", "one a channel"])
def test_the_uncovered_area_has_the_fill(fill):
    content = torch.full((1, 3, 16, 16), 9.0)
    moved = placement(2.0, 10.0).apply(content, fill)[0]
    wanted = torch.as_tensor(fill).expand(3)
    for corner in (moved[:, 0, 0], moved[:, 0, -1], moved[:, -1, 0], moved[:, -1, -1]):
        assert torch.allclose(corner, wanted, atol=1e-6)
    assert torch.allclose(moved[:, 8, 8], torch.full((3,), 9.0), atol=1e-5)


@pytest.mark.parametrize("size", [(40, 40), (33, 48)], ids=["square", "not square and odd"])
def test_an_image_and_its_mask_move_alike(size):
    mask = square(*size, (12, 20), 10)
    where = ZoomOutRotate().draw(torch.ones(1), torch.Generator().manual_seed(4))
    image = where.apply((2 * mask - 1).expand(1, 3, *size), -1.0)
    moved_mask = where.apply(mask[None], 0.0)
    assert not torch.allclose(moved_mask, mask[None], atol=0.5)
    assert torch.allclose(((image + 1) / 2), moved_mask.expand_as(image), atol=1e-5)


@pytest.mark.parametrize("chosen", [True, False])
def test_packed_latents_are_not_taken_for_masks(chosen):
    with pytest.raises(AptError, match=r"must be \[batch, channels, height, width\]; found \(2, 64, 16\): unpack"):
        placement(1.7, -9.0, (chosen, chosen)).apply(torch.zeros(2, 64, 16), 0.0)


@pytest.mark.parametrize("scale", [1.0, 1.04, 1.6, 2.0, 2.3, 3.0])
@pytest.mark.parametrize("size", [(96, 96), (64, 96), (63, 96), (41, 4), (1, 3)], ids=str)
def test_zoom_out_keeps_the_centre_exactly_and_shrinks_each_side_by_the_scale(scale, size):
    exact = placement(scale).apply(torch.ones(1, 1, *size), 0.0)[0]
    moved = exact.round()
    assert torch.allclose(exact, moved, atol=1e-5)  # no edge is smeared
    assert torch.equal(moved, moved.flip(1, 2))
    for side, found in zip(size, (moved.amax(dim=(0, 2)).sum(), moved.amax(dim=(0, 1)).sum()), strict=True):
        assert abs(float(found) - side / scale) <= 1.0


@pytest.mark.parametrize("scale", [1.3, 1.6, 2.0, 3.0])
@pytest.mark.parametrize("angle", [0.0, 12.0])
def test_what_is_in_the_middle_stays_there_at_its_shrunk_size(scale, angle):
    side = 40
    mask = square(97, 96, (48.5, 48), side)
    moved = placement(scale, angle).apply((mask + mask.flip(1))[None] / 2, 0.0)
    assert float(moved.sum()) == pytest.approx(side**2 / scale**2, rel=0.05)
    assert centroid(moved[0]) == pytest.approx((0.0, 0.0), abs=1e-4)


def test_zoom_out_filters_detail_that_the_small_picture_cannot_hold():
    stripes = torch.tensor([1.0, -1.0]).repeat(48).expand(1, 1, 96, 96)
    inside = placement(2.7).apply(stripes, 0.0)[0, 0, 40:56, 40:56]
    assert float(inside.abs().max()) < 0.3  # picking one pixel in 2.7 would leave moire of height 1


@pytest.mark.parametrize("angle", [-15.0, 15.0, 60.0, 90.0])
@pytest.mark.parametrize("size", [(96, 96), (64, 128), (128, 64)], ids=["square", "wide", "tall"])
def test_a_positive_angle_turns_counter_clockwise_without_shear(angle, size):
    right, up = 24.0, 8.0
    mask = square(*size, (size[0] / 2 - up, size[1] / 2 + right), 4)
    found = centroid(placement(angle=angle).apply(mask[None], 0.0)[0])
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    wanted = (right * sin + up * cos, right * cos - up * sin)
    assert found == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept_and_the_result_that_of_float32(dtype):
    content = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = placement(1.5, 10.0).apply(content, -1.0)
    assert moved.dtype == dtype
    assert torch.equal(moved, placement(1.5, 10.0).apply(content.float(), -1.0).to(dtype))


def test_calling_it_moves_every_sample_onto_black():
    content = torch.full((3, 1, 16, 16), 0.5)
    moved = ZoomOutRotate((2.0, 3.0))(content, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moved[:, :, 0], torch.tensor(-1.0))
    assert torch.allclose(moved[:, :, 8, 8], torch.tensor(0.5))


def test_a_placement_for_another_batch_is_refused():
    with pytest.raises(AptError, match="the placement is for 1 samples; found a batch of 2"):
        placement().apply(torch.zeros(2, 1, 8, 8), 0.0)


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"zoom_out": (0.5, 2.0)}, "zoom_out"),
        ({"zoom_out": (3.0, 2.0)}, "zoom_out"),
        ({"zoom_out": (1.0, math.nan)}, "zoom_out"),
        ({"rotation_degrees": -1.0}, "rotation_degrees"),
        ({"rotation_degrees": 181.0}, "rotation_degrees"),
    ],
)
def test_a_range_that_is_empty_or_zooms_in_is_refused(kwargs, key):
    with pytest.raises(AptError, match=f"^{key} must be"):
        ZoomOutRotate(**kwargs)


@pytest.mark.parametrize("shape", [(2, 4, 16, 12), (2, 16, 1, 16, 12), (2, 16 * 12, 7)])
def test_what_is_covered_shrinks_with_the_picture(shape):
    found = placement(scale=2.0, chosen=(True, False)).covered((128, 96))
    at = covered_at(found, shape)
    assert (
        at.shape == (2, *shape[1:-1], 1) if len(shape) == 3 else at.shape == (2, *[1] * (len(shape) - 3), *shape[-2:])
    )
    plane = at.reshape(2, 16, 12)
    assert bool((plane[1] == 1).all())
    wanted = torch.zeros(16, 12)
    wanted[4:12, 3:9] = 1
    assert torch.equal(plane[0], wanted)


def test_sides_that_an_autoencoder_rounds_down_and_a_u_net_up_are_found():
    found = placement(scale=2.0).covered((500, 500))
    for side in (62, 31, 16):
        assert covered_at(found, (1, side * side, 7)).shape == (1, side * side, 1)


def test_positions_that_are_those_of_no_such_picture_are_refused():
    found = placement(scale=2.0).covered((128, 96))
    with pytest.raises(AptError, match='augment_border = "ignore" looks for 100 positions in pictures of 128x96'):
        covered_at(found, (1, 100, 7))


def test_dimensions_are_as_declared_masks_without_channels_and_frames_that_move_alike():
    where = placement(2.0, 7.0, (True, False))
    pictures = torch.rand(2, 3, 16, 12)
    moved = where.apply(pictures, 0.25)
    assert torch.equal(where.apply(pictures[:, 0], 0.25, "bhw"), moved[:, 0])
    video = torch.stack([pictures, pictures.flip(1)], dim=2)
    fills = torch.tensor([0.1, 0.2, 0.3])
    found = where.apply(video, fills, "bcfhw")
    assert torch.equal(found[:, :, 0], where.apply(pictures, fills))
    assert torch.equal(found[:, :, 1], where.apply(pictures.flip(1), fills))


def test_dimensions_that_are_none_are_refused():
    with pytest.raises(AptError, match='dims must be "bchw", "bhw" or "bcfhw"; found "bhwc"'):
        placement().apply(torch.zeros(1, 8, 8, 3), 0.0, "bhwc")

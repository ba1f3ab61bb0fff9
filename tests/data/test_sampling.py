"""What is drawn: frames with wanted steps, targets, and plans that hold every scene once for any number of ranks."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from spa3r.data import sample_frame_indices
from spa3r.data.sampling import EpochPlan, sample_targets


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plan(lengths=(100,), weights=None, num_scenes="all", views=(4, 12), pictures=24, world=1, seed=0, epoch=0):
    num_scenes = sum(lengths) if num_scenes == "all" else num_scenes
    return EpochPlan(lengths, weights, num_scenes, views, pictures, world, seed, epoch)


def scenes(plan: EpochPlan, world: int = 1, steps: int | None = None) -> list[list[tuple]]:
    """(source, scene, views) of every step, all ranks one after the other."""
    return [
        [(*plan.scene_at(place), step.views) for rank in range(world) for place in step.share(rank, world)]
        for step in islice(plan.steps(), steps)
    ]


# Frames ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowest", "highest"), [(1, 1), (2, 6), (20, 60)])
def test_steps_between_frames_are_in_the_range_and_all_of_it_is_drawn(lowest, highest):
    draws = [sample_frame_indices(1000, 8, (lowest, highest), rng(seed)) for seed in range(400)]
    steps = np.diff(draws)
    assert steps.min() == lowest and steps.max() == highest
    assert len(set(steps.ravel())) == highest - lowest + 1
    assert min(draw[0] for draw in draws) >= 0 and max(draw[-1] for draw in draws) <= 999


def test_first_frames_reach_from_the_first_to_the_last_that_fits():
    draws = [sample_frame_indices(10, 3, (2, 2), rng(seed)).tolist() for seed in range(200)]
    assert {draw[0] for draw in draws} == set(range(6))
    assert all(draw == [draw[0], draw[0] + 2, draw[0] + 4] for draw in draws)


@pytest.mark.parametrize("num_frames", [22, 30, 43, 44])
def test_the_longest_step_is_lowered_to_fit(num_frames):
    draws = np.array([sample_frame_indices(num_frames, 8, (2, 6), rng(seed)) for seed in range(300)])
    assert np.diff(draws).min() == 2 and np.diff(draws).max() == min(6, (num_frames - 1) // 7)
    assert draws.min() >= 0 and draws.max() < num_frames


@pytest.mark.parametrize("num_frames", [8, 9, 14])
def test_where_no_step_fits_frames_are_drawn_once_each(num_frames):
    draws = np.array([sample_frame_indices(num_frames, 8, (2, 6), rng(seed)) for seed in range(50)])
    assert np.diff(draws).min() >= 1 and draws.max() < num_frames
    assert len(set(draws.ravel())) == num_frames


@pytest.mark.parametrize("num_frames", [1, 3, 7])
def test_fewer_frames_than_views_are_repeated_in_order(num_frames):
    draws = np.array([sample_frame_indices(num_frames, 8, (2, 6), rng(seed)) for seed in range(50)])
    assert draws.shape == (50, 8) and np.diff(draws).min() == 0
    assert set(draws.ravel()) == set(range(num_frames))


def test_one_view_is_any_frame():
    assert {int(sample_frame_indices(5, 1, (2, 6), rng(seed))[0]) for seed in range(100)} == set(range(5))


@pytest.mark.parametrize(
    ("views", "ratio", "context"), [(5, 0.5, 2), (4, 0.5, 2), (4, 0.75, 1), (12, 1, 1), (1, 0.5, 1)]
)
def test_targets_leave_the_context_of_the_method(views, ratio, context):
    masks = np.array([sample_targets(views, ratio, rng(seed)) for seed in range(100)])
    assert (views - masks.sum(1) == context).all() and not masks[:, 0].any()
    assert masks[:, 1:].any(0).all()
    if context > 1:
        assert not masks[:, 1:].all(0).any()


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [(97,), (8,), (30, 1, 60)])
def test_every_scene_comes_once_an_epoch(world, lengths):
    for epoch in range(3):
        ours = plan(lengths, world=world, epoch=epoch)
        steps = scenes(ours, world)
        seen = Counter(scene[:2] for step in steps for scene in step)
        assert set(seen.values()) == {1}
        assert sum(seen.values()) == sum(lengths)  # 24 pictures hold two scenes of 12 views, so nothing is left over
        assert len(steps) == ours.num_steps == plan(lengths, world=world).num_steps


@pytest.mark.parametrize("world", [2, 3, 7])
def test_every_rank_has_a_scene_in_every_step_and_keeps_its_budget(world):
    for total in range(world, 80):
        for step in plan((total,), world=world).steps():
            shares = [len(step.share(rank, world)) for rank in range(world)]
            assert min(shares) >= 1 and max(shares) * step.views <= 24


def test_a_budget_of_one_scene_leaves_less_than_a_scene_a_rank_over():
    for total in range(3, 40):
        seen = [scene for step in scenes(plan((total,), views=(4, 4), pictures=4, world=3), 3) for scene in step]
        assert total - 2 <= len(seen) <= total and len(set(seen)) == len(seen)


def test_two_ranks_with_half_the_budget_see_what_one_sees():
    one, two = plan(views=(4, 4), pictures=24), plan(views=(4, 4), pictures=12, world=2)
    assert scenes(one) == scenes(two, 2) and len(scenes(one)) == 17


def test_epochs_and_seeds_differ_and_repeat():
    first = scenes(plan())
    assert first == scenes(plan())
    for other in (plan(epoch=1), plan(seed=1)):
        assert scenes(other) != first
        assert sorted(scene[:2] for step in scenes(other) for scene in step) == [(0, scene) for scene in range(100)]


def test_all_numbers_of_views_are_drawn():
    views = Counter(step.views for step in plan((20_000,)).steps())
    assert set(views) == set(range(4, 13)) and min(views.values()) > 0.8 * max(views.values())


def test_steps_are_found_without_those_before():
    ours = plan((500,), world=2)
    steps = list(ours.steps())
    assert list(ours.steps(7, 3)) == steps[7::3]
    endless = plan((None,), num_scenes=None)
    assert list(islice(endless.steps(5, 2), 5)) == list(islice(endless.steps(), 15))[5::2]


def test_a_longer_epoch_starts_over_in_a_new_order_and_a_shorter_one_changes():
    seen = [scene[1] for step in scenes(plan((30,), num_scenes=90, views=(4, 4))) for scene in step]
    turns = [seen[:30], seen[30:60], seen[60:]]
    assert all(sorted(turn) == list(range(30)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    short = [
        {scene[1] for step in scenes(plan((1000,), num_scenes=100, epoch=epoch)) for scene in step} for epoch in (0, 1)
    ]
    assert [len(epoch) for epoch in short] == [100, 100] and len(short[0] & short[1]) < 50


def test_weights_are_shares_and_small_sources_start_over():
    ours = plan((5, 1000, None), [1, 2, 1], num_scenes=10_000)
    seen = [scene[:2] for step in scenes(ours) for scene in step]
    shares = Counter(source for source, _ in seen)
    assert all(abs(shares[source] / 10_000 - share) < 0.02 for source, share in enumerate([0.25, 0.5, 0.25]))
    small = [scene for source, scene in seen if source == 0]
    turns = [small[start : start + 5] for start in range(0, len(small) - 5, 5)]
    assert all(sorted(turn) == list(range(5)) for turn in turns) and len(set(map(tuple, turns))) > 10
    large = [scene for source, scene in seen if source == 1]
    assert len(set(large[:1000])) == 1000
    assert [scene for source, scene in seen if source == 2] == list(range(shares[2]))


def test_weighted_places_are_found_without_those_before():
    lengths, weights = (5, 1000, None), [1, 2, 1]
    ours = plan(lengths, weights, num_scenes=None)
    expected = [ours.scene_at(place) for place in range(9000)]
    for place in (8999, 0, 4096, 4095, 20):
        assert plan(lengths, weights, num_scenes=None).scene_at(place) == expected[place]

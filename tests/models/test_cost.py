"""The cost of a scene: counted without data as it is in a real run, and said when memory runs out."""

import pytest
import torch
from tiny import PATCH, alive, depth_anything_3_config, spa3r_config, vggt_config, view_inputs
from torch.utils.flop_counter import FlopCounterMode

from spa3r import Spa3RModel
from spa3r.models import cost, layers
from spa3r.models.cost import LiveBytes, largest_scene, scene_cost

GRID = (6, 8)


@pytest.fixture(params=(vggt_config, depth_anything_3_config), ids=("vggt", "depth_anything_3"))
def model(request, monkeypatch) -> Spa3RModel:
    monkeypatch.setattr(layers, "CPU_CHUNK_BYTES", 2**15)
    monkeypatch.setattr(layers, "CHUNK_BYTES", 2**15)
    return alive(Spa3RModel(spa3r_config(backbone_config=request.param())))


@pytest.mark.parametrize("views", (1, 20))
def test_a_scene_costs_what_is_counted_in_a_real_run(views, model):
    said = scene_cost(model, views, GRID)
    inputs = view_inputs([[GRID] * views])
    with LiveBytes([*model.parameters(), *model.buffers()]) as count, torch.no_grad():
        count.add(inputs["view_pixel_values"])
        model.encode(**inputs)
    peak = count.peak
    assert said.tokens == views * (GRID[0] * GRID[1] + model.config.backbone_config.num_special_tokens)
    assert said.weights == sum(p.nbytes for p in model.parameters())
    assert said.memory == said.weights + said.activations
    assert said.activations == pytest.approx(peak, rel=0.01)


@pytest.mark.slow
def test_memory_grows_evenly_where_the_chunks_of_all_layers_are_full(model):
    """Those of the encoder are full last, since its MLPs are the narrowest."""
    config = spa3r_config(backbone_config=model.config.backbone_config, mlp_ratio=0.5)
    narrow = Spa3RModel(config)
    (_, (many, _), _) = cost._growth(narrow, GRID)
    assert scene_cost(narrow, 2 * many, GRID).activations == cost._activations(narrow, 2 * many, GRID)


@pytest.mark.parametrize("views", (1, 6))
def test_operations_are_counted_exactly(views, model):
    hollow = cost._hollow(model, model.config)
    with FlopCounterMode(display=False) as counter:
        cost._encode_nothing(hollow, views, GRID)
    assert scene_cost(model, views, GRID).operations == counter.get_total_flops()


def test_the_largest_scene_fits_and_a_larger_one_does_not(model):
    budget = 2 * 2**20
    views = largest_scene(model, GRID, budget)
    assert scene_cost(model, views, GRID).memory <= budget < scene_cost(model, views + 1, GRID).memory
    assert largest_scene(model, GRID, 1000) == 0


def test_running_out_of_memory_names_what_fits(model, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:  # a count runs the class's other instances
        patch.setattr(model.encoder, "forward", fail)
        patch.setattr(cost, "total_memory", lambda device: 2 * 2**20)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            model.encode(**view_inputs([[GRID] * 40]))
    text = str(caught.value)
    fits = int(text.partition("By this count ")[2].partition(" views fit")[0])
    assert f"Out of memory on cpu: a scene of 40 views of {GRID[1] * PATCH} x {GRID[0] * PATCH} in float32" in text
    assert 0 < fits < 40 and "dtype=torch.bfloat16" in text


def test_a_real_allocation_that_fails_is_recognized(model):
    layout = cost.ViewLayout.from_inputs([GRID], [1])
    with pytest.raises(torch.OutOfMemoryError, match="views fit"), cost.naming_what_fits(model, layout):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass(model):
    layout = cost.ViewLayout.from_inputs([GRID], [1])
    with pytest.raises(RuntimeError, match=r"^something else$"), cost.naming_what_fits(model, layout):
        raise RuntimeError("something else")

"""Weights that change under a live placement, by vLLM's own ways to load and update them, and in its sleep mode."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llep.moe.captured import TURNS, DeviceMap
from llep.placement import Placement

# vLLM and what it imports are not written for warnings as errors.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

EXPERTS, RANKS = 8, 2
LOCAL = EXPERTS // RANKS
HOME = Placement.linear(EXPERTS, RANKS, 0)
IDS = torch.arange(EXPERTS, dtype=torch.int32).repeat_interleave(TURNS)[:, None]  # of tokens at every turn


class Layer(torch.nn.Module):
    """The local experts of rank 0: a weight and a scale each, loaded one expert after the other."""

    def __init__(self) -> None:
        from vllm.model_executor.utils import set_weight_attrs

        super().__init__()
        for name, shape in (("weight", (LOCAL, 8, 8)), ("scale", (LOCAL, 1))):
            parameter = torch.nn.Parameter(torch.ones(shape), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self.weight_loader})
            self.register_parameter(name, parameter)

    def weight_loader(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, expert_id: int) -> None:
        if expert_id < LOCAL:
            param.data[expert_id].copy_(loaded_weight)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llep.vllm_plugin.experts as in a process where nothing has been loaded."""
    from llep.vllm_plugin import experts

    for name, value in (("_num_loads", 0), ("_is_asleep", False), ("_when_loaded", []), ("_when_woken", [])):
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(experts, "RoutedExperts", Layer)
    monkeypatch.setattr(Layer, "weight_loader", Layer.weight_loader)  # restored afterwards
    experts.count_loads()
    return experts


@pytest.fixture
def device_map() -> DeviceMap:
    """Rank 0's, under a live placement: it has a copy of expert 5 in row 1 of its room, and rank 1 one of expert 0."""
    made = DeviceMap(HOME, [expert % LOCAL for expert in range(EXPERTS)], 0, 2, torch.device("cpu"))
    made.follow(Placement(HOME.home_rank, HOME.free_slots, ((0, 1), (5, 0))), {5: 1})
    assert rows(made) != ALONE
    return made


def rows(device_map: DeviceMap) -> tuple[list[int], list[int]]:
    own, room = device_map.rows(IDS)
    return own.flatten().tolist(), room.flatten().tolist()


ALONE = [row for row in (*range(LOCAL), *[LOCAL] * LOCAL) for _ in range(TURNS)], [2] * EXPERTS * TURNS


def test_layers_are_reloaded_to_the_end(told: Any, device_map: DeviceMap) -> None:
    """vLLM takes a layer for complete when so many values were copied as it has: nothing else may be copied in it."""
    from vllm.model_executor.model_loader.reload import layerwise

    model = torch.nn.Sequential(Layer())
    layerwise.record_metadata_for_reloading(model)
    told.when_loaded(device_map.home_only)
    layerwise.initialize_layerwise_reload(model)
    parameters = dict(model.named_parameters())  # once, as models' load_weights do
    for expert in range(EXPERTS):
        for name, shape in (("weight", (8, 8)), ("scale", (1,))):
            parameter = parameters[f"0.{name}"]
            parameter.weight_loader(parameter, torch.full(shape, 2.0 + expert), expert)
    layerwise.finalize_layerwise_processing(model, SimpleNamespace(dtype=torch.float32))  # type: ignore[arg-type]
    for tensor in (model[0].weight, model[0].scale):
        assert tensor.flatten(1)[:, -1].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert rows(device_map) == ALONE
    assert told.num_loads() > 0


def test_sparse_updates_are_loaded(told: Any, device_map: DeviceMap) -> None:
    """vLLM puts another function in the place of Tensor.copy_ meanwhile, for values alone."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import _load_nan_masked_weights

    layer = Layer()

    def load_weights(weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        for expert, (_, values) in enumerate(weights):
            layer.weight_loader(layer.weight, values, expert)
        return {"weight"}

    layer.load_weights = load_weights  # type: ignore[assignment]
    told.when_loaded(device_map.home_only)
    values = torch.full((8, 8), float("nan"))
    values[0, 3] = 7.0
    _load_nan_masked_weights(layer, [("weight", values)])
    assert layer.weight[0, 0].tolist() == [1.0] * 3 + [7.0] + [1.0] * 4
    assert rows(device_map) == ALONE


class Worker:
    """A worker that sleeps as one on a GPU does: what is in the memory of weights is lost, or brought back."""

    def __init__(self, device_map: DeviceMap) -> None:
        self.device_map = device_map
        self.level = 0

    def sleep(self, level: int = 1) -> None:
        self.level = level
        self.lost = [tables.clone() for tables in self._tables()]
        for tables in self._tables():
            tables.fill_(-1)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if tags is None or "weights" in tags:
            for tables, lost in zip(self._tables(), self.lost, strict=True):
                assert (tables == -1).all(), "written while there was no memory"
                tables.copy_(lost if self.level == 1 else torch.zeros_like(lost))

    def discard(self, tags: tuple[str, ...]) -> None:
        if "weights" in tags:
            self.sleep(2)

    def _tables(self) -> tuple[torch.Tensor, ...]:
        return self.device_map._own_SE, self.device_map._room_SE, self.device_map._first

    def changed(self, *args: object) -> None:
        """Any of the ways in which a worker is told to change weights."""

    reload_weights = reset_weights = update_weights = changed
    start_weight_update = start_draft_weight_update = finish_weight_update = changed


@pytest.fixture
def worker(told: Any, device_map: DeviceMap, monkeypatch: pytest.MonkeyPatch) -> Worker:
    class Kind(Worker):
        pass

    module = SimpleNamespace(Worker=Kind)
    monkeypatch.setitem(told.sys.modules, "module_of_a_worker", module)
    monkeypatch.setattr(told, "_WORKERS", (("module_of_a_worker", "Worker"),))
    told.count_changes()
    told.when_loaded(device_map.home_only)
    told.when_woken(device_map.restore)
    return Kind(device_map)


@pytest.mark.parametrize("is_placed", [True, False])
@pytest.mark.parametrize("level", [1, 2])
def test_what_captured_steps_read_is_there_after_sleep(
    told: Any, worker: Worker, level: int, is_placed: bool, device_map: DeviceMap
) -> None:
    """Written once the memory of weights is there again, and loads meanwhile write nothing."""
    if not is_placed:
        device_map.home_only()
    worker.sleep(level)
    worker.reload_weights()
    worker.wake_up(["kv_cache"])
    before = told.num_loads()
    worker.wake_up(tags=["weights"])
    assert told.num_loads() == before + 1
    assert rows(device_map) == ALONE
    device_map.follow(Placement(HOME.home_rank, HOME.free_slots, ((5, 0),)), {5: 1})
    worker.reload_weights()  # awake again: loads are told
    assert rows(device_map) == ALONE


def test_weights_that_are_discarded_are_as_asleep(worker: Worker, device_map: DeviceMap) -> None:
    worker.discard(("kv_cache",))
    worker.reload_weights()
    assert rows(device_map) == ALONE
    device_map.follow(Placement(HOME.home_rank, HOME.free_slots, ((5, 0),)), {5: 1})
    worker.discard(("weights",))
    worker.reload_weights()
    worker.wake_up()
    assert rows(device_map) == ALONE


@pytest.mark.parametrize(
    "change",
    [
        *("reload_weights", "reset_weights", "update_weights"),
        *("start_weight_update", "start_draft_weight_update", "finish_weight_update"),
    ],
)
def test_every_way_to_change_weights_is_counted(told: Any, worker: Worker, change: str, device_map: DeviceMap) -> None:
    """vLLM's sharded_rdt writes into the parameters' data: neither a loader nor torch's count sees it."""
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker

    assert hasattr(VllmWorker, change)
    before = told.num_loads()
    getattr(worker, change)()
    assert told.num_loads() == before + 1
    assert rows(device_map) == ALONE


def test_maps_of_rows_are_written_where_they_were() -> None:
    from llep.vllm_plugin.experts import VllmExperts

    experts = object.__new__(VllmExperts)
    experts._maps = {}
    experts._prepare_map({"w13_weight": torch.empty(3, 1)})
    places = experts._maps[3]
    places.zero_()
    experts.restore_maps()
    assert places.tolist() == [0, 1, 2, -1]

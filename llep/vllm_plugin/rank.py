"""What all MoE layers of one rank share: the EP group, the lending pool, the agreed settings, the load window."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group, get_tensor_model_parallel_rank
from vllm.forward_context import ForwardContext

from llep import __version__
from llep.config import Mode, Settings, load_settings
from llep.cost import CostModel, cost_model
from llep.errors import UnsupportedConfiguration
from llep.loads import imbalance_ratio
from llep.messages import PROTOCOL, EngineInfo, PlacementOrder, Report
from llep.moe.agreement import CLOCK_US, HEADER_SIZE, WEIGHTS, AgreedSettings, RanksDisagree, agreed_step
from llep.moe.captured import DeviceMap, compute_captured
from llep.moe.layer import Counts, LayerResult, LeastLoadedMoE
from llep.moe.replicas import NO_ROOM, PlacedLayer, Replicas, Room
from llep.moe.slots import LendingPool, available_host_bytes, bytes_per_expert, total_host_bytes
from llep.moe.transport import Transport
from llep.moe.verify import is_probe, is_sampled, verify
from llep.moe.window import LayerStep, LoadWindow
from llep.moe.workspace import Workspace
from llep.placement import Placement, ranks_per_node
from llep.plan import Decision, Plan
from llep.planning import warm_up
from llep.planning.home import plan_home
from llep.planning.policy import Step, decide, needs_counts, plans_replicas
from llep.shapes import ModelShape
from llep.spool import spool_dir
from llep.vllm_plugin import DEALING_BACKENDS
from llep.vllm_plugin.courier import AgentProcess, Courier
from llep.vllm_plugin.dummy import is_dummy_run, mark_dummy_runs
from llep.vllm_plugin.experts import VllmExperts, count_changes, num_loads, when_loaded, when_woken
from llep.vllm_plugin.recording import Recorder

logger = logging.getLogger("vllm.llep")

# Parts of the pool that layers take turns in. Over gloo the host has waited for a layer's lends, and computed with
# them, before the next layer's are posted; on CUDA it has only enqueued that.
HALVES = {"cpu": 1, "cuda": 2}
LONGEST_NAME_BYTES = 1024


@dataclass(frozen=True, slots=True)
class RankStep:
    """One forward pass on this rank. rows: how many of its tokens take part; the rest are padding or dummy."""

    step: Step
    settings: Settings
    rows: int
    is_real: bool


@dataclass(slots=True)
class RankLayer:
    """One MoE layer on this rank. index: its place among the MoE layers; number: the model's number of the layer."""

    index: int
    number: int
    experts: VllmExperts
    placed: PlacedLayer
    most_made_up: int = 0  # tokens of the largest made-up step so far

    def is_largest_made_up(self, step: RankStep) -> bool:
        """Whether the step is made up and larger than those before it: the same on all ranks, once for each step."""
        tokens = step.step.tokens
        if step.is_real or tokens <= self.most_made_up:
            return False
        self.most_made_up = tokens
        return True

    @property
    def moe(self) -> LeastLoadedMoE:
        return self.placed.moe

    @property
    def placement(self) -> Placement:
        """Where its experts are now."""
        return self.placed.placement


class Rank:
    """One per worker process. Layers add themselves once their weights are in their final form."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        parallel = vllm_config.parallel_config
        additional = vllm_config.additional_config
        start = additional.get("llep", {}) if isinstance(additional, dict) else {}
        settings, self._sources = load_settings(start)
        self.config = vllm_config
        self.is_replicated = parallel.data_parallel_size == 1
        # With both kinds of parallelism vLLM deals a batch's tokens out over the tensor-parallel ranks: none twice.
        self._part = get_tensor_model_parallel_rank() if parallel.use_sequence_parallel_moe else 0
        self.agreed = AgreedSettings(settings, self._check_placement)
        self._start_settings = settings
        self.layers: list[RankLayer] = []
        self.weights_taken = 0  # layers whose weights vLLM has put into their final form again
        self._pools: dict[tuple[Any, ...], LendingPool] = {}
        self._rooms: dict[tuple[Any, ...], Room] = {}
        self._workspaces: dict[int, Workspace] = {}
        self._window: LoadWindow | None = None
        self._recorder: Recorder | None = None
        self._expected_layers = 0
        self._step_number = 0
        self._steps = {"prefill": 0, "decode": 0}
        self._current: RankStep | None = None
        self._report_seq = 0
        self._counting_since_s = time.monotonic()
        self._has_lent = False
        self._is_trusted = True  # until a verified step differs
        mark_dummy_runs()
        count_changes()
        warm_up()  # compiles the planners on a machine's first start, and takes them from the cache afterwards
        group = get_ep_group()
        self._transport = Transport(group.ranks, group.device, settings.watchdog_s)
        logger.info("llep: weights are lent by %s", self._transport.lends_by)
        self._replicas = Replicas(self._transport)
        when_loaded(self._replicas.home_only)
        when_woken(self._wake_up)
        self._machines = self._machine_of_ranks()
        self._ranks_per_node = ranks_per_node(self._machines)
        self._cost_model = self._agreed_cost_model(settings.cost_model)
        seed = torch.tensor([secrets.randbits(62)], dtype=torch.int64, device=group.device)
        self._transport.broadcast(seed, "naming of the engine's incarnation")
        self._incarnation = f"{int(seed):016x}"

    # -- at start ------------------------------------------------------------------------------------------------

    def expect_layer(self) -> None:
        """One more MoE layer was made; its weights are still to come."""
        self._expected_layers += 1

    def add_layer(self, layer_name: str, routed_experts: Any) -> RankLayer:
        """Take in one layer whose weights are loaded and in their final form; every rank enters it, in layer order."""
        experts = VllmExperts(routed_experts)
        workspace = self._workspace_for(experts)
        model = self.config.model_config
        workspace_bytes = workspace.bytes_for(model.get_hidden_size(), model.dtype)
        room = self._room_for(experts.weights)
        pool = self._pool_for(experts.weights, room.bytes + workspace_bytes)
        half = pool.half(len(self.layers))
        experts.prepare_bank(half.tensors)
        if room.rows:
            experts.prepare_bank(room.bank)
        home_rank, local_ids = self._home_of_experts(experts)
        moe = LeastLoadedMoE(experts, self._transport, half, home_rank, local_ids, workspace)
        home = Placement(home_rank, (pool.slots,) * self._transport.size)
        device_map = None
        if room.rows and is_mapped(self.config, experts):
            device_map = DeviceMap(home, local_ids, self._transport.rank, room.rows, self._transport.device)
        placed = self._replicas.add_layer(moe, home, room, device_map)
        layer = RankLayer(len(self.layers), _layer_number(layer_name), experts, placed)
        self.layers.append(layer)
        if len(self.layers) == self._expected_layers and self._window is None:
            self._start_reporting()
        return layer

    def _room_for(self, weights: Mapping[str, torch.Tensor]) -> Room:
        """Room for resident replicas of experts of this shape: one for all layers that have it."""
        shape = _shape_of(weights)
        if shape not in self._rooms:
            settings = self._start_settings
            room = NO_ROOM
            if rows := settings.replica_slots_per_rank:
                room = Room.reserve(weights, rows, settings.memory_budget_bytes, self._available_bytes())
                logger.info(
                    "llep: room for resident replicas reserved: %d bytes per rank (%d experts of %d bytes over all "
                    "layers of this shape), before the KV cache is sized",
                    room.bytes,
                    room.rows,
                    bytes_per_expert(weights),
                )
            self._rooms[shape] = room
        return self._rooms[shape]

    def _pool_for(self, weights: Mapping[str, torch.Tensor], other_bytes: int) -> LendingPool:
        """The pool for experts of this shape, one for all layers that have it. other_bytes: of the budget, for what
        else there is."""
        shape = _shape_of(weights)
        if shape not in self._pools:
            settings = self._start_settings
            slots = settings.slots_per_rank
            if self._sources["slots_per_rank"] == "default":
                slots = min(slots, len(next(iter(weights.values()))))
            pool = LendingPool.reserve(
                weights,
                slots,
                settings.memory_budget_bytes,
                self._available_bytes(),
                other_bytes,
                halves=HALVES[self._transport.device.type],
            )
            self._pools[shape] = pool
            logger.info(
                "llep: lending pool reserved: %d bytes per rank (%d x %d slots of %d bytes), shared by all layers of "
                "this shape, before the KV cache is sized",
                pool.bytes,
                pool.halves,
                pool.slots,
                bytes_per_expert(weights),
            )
        return self._pools[shape]

    def _workspace_for(self, experts: VllmExperts) -> Workspace:
        """Room for the rows of one layer: the same for all layers that choose as many experts per token."""
        if experts.top_k not in self._workspaces:
            self._workspaces[experts.top_k] = Workspace.for_batches(
                self.config.scheduler_config.max_num_batched_tokens,
                experts.top_k,
                self._transport.size,
                self._transport.device,
                is_replicated=self.is_replicated,
            )
        return self._workspaces[experts.top_k]

    def _available_bytes(self) -> int | None:
        """This rank's part of the host's memory, the same number on all ranks; None where the pool is elsewhere.

        Asked before any rank reserves, so that ranks that share a machine don't each take what there is but once.
        """
        if self._transport.device.type != "cpu":
            return None
        row = torch.tensor([available_host_bytes() or -1], dtype=torch.int64)
        free_R = self._transport.gather(row, "comparison of free memory").reshape(-1).tolist()
        sharing = Counter(self._machines)
        parts = [free // sharing[machine] for machine, free in zip(self._machines, free_R, strict=True) if free >= 0]
        return min(parts, default=None)

    def _machine_of_ranks(self) -> list[int]:
        """A number for the machine of each rank; a container is a machine of its own."""
        row = torch.tensor([_digest(_machine())], dtype=torch.int64, device=self._transport.device)
        machines: list[int] = self._transport.gather(row, "naming of machines").reshape(-1).tolist()
        return machines

    def _agreed_cost_model(self, name: str) -> CostModel | None:
        """The cost model of that name, None for ''. Raises SettingsError, or RanksDisagree where files differ."""
        model = cost_model(name) if name else None
        row = torch.tensor([_digest(repr(model))], dtype=torch.int64, device=self._transport.device)
        digests = self._transport.gather(row, "comparison of cost models").reshape(-1).tolist()
        if len(set(digests)) > 1:
            rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            raise RanksDisagree(
                f"cost_model={name!r} is another one on EP rank {rank} than on rank 0: give all machines the same file"
            )
        return model

    def _home_of_experts(self, experts: VllmExperts) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(home rank, row in the home rank's weights) of each expert, from what all ranks say they own."""
        owned_RE = self._transport.gather(experts.local_map_E, "exchange of home ranks").cpu().numpy()
        owners = (owned_RE >= 0).sum(axis=0)
        if (owners != 1).any():
            expert = int((owners != 1).argmax())
            raise UnsupportedConfiguration(
                f"expert {expert} has {owners[expert]} home ranks, llep wants exactly 1: switch off redundant experts "
                "(--eplb-config num_redundant_experts) and --enable-eplb"
            )
        home_rank = owned_RE.argmax(axis=0)
        return tuple(home_rank.tolist()), tuple(owned_RE.max(axis=0).tolist())

    def _start_reporting(self) -> None:
        """Begin to report: called once, when the weights of all layers are in place. A draft model's come later: they
        are balanced like all others, but not counted."""
        first = self.layers[0]
        self._window = LoadWindow(
            np.array([layer.placement.home_rank for layer in self.layers]),
            ep_size=self._transport.size,
            top_k=first.experts.top_k,
            bytes_per_lend=first.placed.bytes_per_expert,
            ranks_per_node=self._ranks_per_node,
        )
        self._info = self._engine_info(first)
        rank = self._transport.rank
        first_here = self._machines.index(self._machines[rank])  # of this machine's ranks: it starts their agent
        name = f"{self._incarnation}-{first_here}.sock"
        socket_path = str(Path(tempfile.gettempdir()) / f"llep-{os.getuid()}" / name)
        if rank == 0:
            spool, shape = spool_dir(self._start_settings.record_dir), self._shape()
            self._recorder = Recorder(spool, self._info.engine, self._incarnation, shape, self._transport.size)
            self._recorder.record_from_start(self._start_settings.record_max_bytes)
        if has_scheduler():
            agent = AgentProcess(socket_path, self._info.engine) if rank == first_here else None
            Courier(socket_path, self.report, self.agreed, self._replicas, agent).start()
        elif rank == first_here:
            logger.info(
                "llep: LLEP_RAY_ADDRESS is not set: no scheduler, the settings at start hold while this engine runs"
            )

    def _engine_info(self, layer: RankLayer) -> EngineInfo:
        config = self.config
        model = config.model_config
        name = model.served_model_name
        model_name = name[0] if isinstance(name, list) else name
        pool = next(iter(self._pools.values()))
        return EngineInfo(
            engine=self._name_of_rank_0(os.environ.get("LLEP_ENGINE") or model_name.rstrip("/").rpartition("/")[2]),
            model_name=model_name,
            llep_version=__version__,
            vllm_version=vllm.__version__,
            backend=self._transport.device.type,
            quantization=model.quantization or "none",
            dtype=str(model.dtype).removeprefix("torch."),
            ep_size=self._transport.size,
            tp_size=config.parallel_config.tensor_parallel_size,
            dp_size=config.parallel_config.data_parallel_size,
            layer_numbers=tuple(layer.number for layer in self.layers),
            num_experts=layer.placement.num_experts,
            top_k=layer.experts.top_k,
            slots_per_rank=pool.slots,
            bytes_per_slot=layer.placed.bytes_per_expert,
            replica_slots_per_rank=next(iter(self._rooms.values())).rows,
            ranks_per_node=self._ranks_per_node or 0,
            max_model_len=model.max_model_len,
            settings=self._start_settings.dump(),
            setting_sources=self._sources,
            cost_model=self._cost_model,
        )

    def _name_of_rank_0(self, name: str) -> str:
        """What rank 0 calls this engine: machines of one engine may have been given a name each."""
        data = name.encode()[:LONGEST_NAME_BYTES].ljust(LONGEST_NAME_BYTES, b"\0")
        row = torch.tensor(list(data), dtype=torch.uint8, device=self._transport.device)
        self._transport.broadcast(row, "naming of the engine")
        return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore")

    def _shape(self) -> ModelShape:
        info, text_config = self._info, self.config.model_config.hf_text_config
        intermediate = getattr(text_config, "moe_intermediate_size", None) or text_config.intermediate_size
        return ModelShape(
            name=info.engine,
            layer_numbers=info.layer_numbers,
            num_experts=info.num_experts,
            top_k=info.top_k,
            hidden_size=self.config.model_config.get_hidden_size(),
            intermediate_size=int(intermediate),
            bytes_per_expert=info.bytes_per_slot,
        )

    # -- every step ----------------------------------------------------------------------------------------------

    def begin_layer(self, layer: RankLayer, context: ForwardContext, num_tokens: int) -> RankStep:
        """This layer's step; before the first layer, all ranks agree on it. Every rank enters it."""
        if layer.index == 0 or self._current is None:
            self._current = self._agree_on_step(context, num_tokens)
        if layer.index < len(self._info.layer_numbers):
            return self._current
        return self._draft_step(self._current, context, num_tokens)

    def _draft_step(self, agreed: RankStep, context: ForwardContext, num_tokens: int) -> RankStep:
        """A draft model's: its tokens are its own, and what was agreed on may be of long ago, where the steps of the
        model itself are replayed from graphs. Where tokens are replicated all ranks see the same, without a word."""
        real_tokens, is_prefill = tokens_of(context, num_tokens, self._part)
        step, is_real = agreed.step, agreed.is_real
        if self.is_replicated:
            is_real = real_tokens is not None
            step = Step("prefill" if is_prefill else "decode", num_tokens if real_tokens is None else real_tokens)
        return RankStep(step, agreed.settings, _rows(real_tokens, num_tokens, is_real=is_real), is_real)

    def _agree_on_step(self, context: ForwardContext, num_tokens: int) -> RankStep:
        self._step_number += 1
        real_tokens, is_prefill = tokens_of(context, num_tokens, self._part)
        is_dummy = real_tokens is None
        header = self.agreed.header(
            self._step_number,
            num_tokens if real_tokens is None else real_tokens,
            is_dummy=is_dummy,
            is_prefill=is_prefill,
            weights=self._times_weights_changed(),
        )
        self._transport.where = f"step {self._step_number}, before its first layer"
        row = torch.from_numpy(header).to(self._transport.device)
        headers = self._transport.gather(row, "agreement on the step").cpu().numpy().reshape(-1, HEADER_SIZE)
        before = self.agreed.live.number
        self.agreed.agree(headers)
        settings = self.agreed.live.settings
        self._transport.settings_digest = self.agreed.live.digest
        if self.agreed.live.number != before:
            logger.info("llep: settings revision %d is live from step %d", self.agreed.live.number, self._step_number)
            if self._recorder is not None:
                self._recorder.follow(self.agreed.live.recording, settings.record_max_bytes)
        self._replicas.follow(
            self.agreed.live.placement,
            headers[0, CLOCK_US] / 1e6,
            headers[:, WEIGHTS].tolist(),
            may_fill=settings.mode is Mode.ACTIVE and self._is_trusted,
        )
        self._map_captured()
        step, is_real = agreed_step(headers, is_replicated=self.is_replicated)
        # Until the first real step ranks may compile kernels for minutes, each at its own pace.
        self._transport.watchdog_s = settings.watchdog_s if any(self._steps.values()) else 1800.0
        if is_real:
            self._steps[step.phase] += 1
        return RankStep(step, settings, _rows(real_tokens, num_tokens, is_real=is_real), is_real)

    def _map_captured(self) -> None:
        """Have captured steps use the replicas that act under the live settings. Every rank enters it."""
        settings = self.agreed.live.settings

        def acts(place: int, placement: Placement) -> bool:
            is_active = self._is_trusted and settings.mode is Mode.ACTIVE
            return is_active and plans_replicas(settings, self.layers[place].number, placement)

        self._replicas.map_captured((self.agreed.live.number, self._is_trusted), acts)

    def run_captured(
        self, layer: RankLayer, hidden_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' output [T, H] as in run_layer, without the host: what a CUDA graph replays. Tokens and
        outputs are exchanged by vLLM. Every rank enters it."""
        placed, is_dealt_out = layer.placed, self.config.parallel_config.use_sequence_parallel_moe
        assert placed.device_map is not None
        if not self.is_replicated:
            hidden_TH, gates_TK, ids_TK = get_ep_group().dispatch(hidden_TH, gates_TK, ids_TK, is_dealt_out)
        output_TH = compute_captured(
            layer.experts, placed.room.bank, placed.device_map, hidden_TH, gates_TK, ids_TK.to(torch.int32)
        )
        if self.is_replicated:
            return output_TH
        combined_TH: torch.Tensor = get_ep_group().combine(output_TH, is_dealt_out)
        return combined_TH

    def rehearse_layer(self, layer: RankLayer, step: RankStep, is_largest: bool, *batch: torch.Tensor) -> torch.Tensor:
        """run_layer in a step that is made up on all ranks. What may come later runs first, so that its kernels are
        compiled and its memory is seen: what is captured, and in the largest step as many rows at a time as any
        batch may have, with each bank. Every rank enters it, and in it no other collectives than theirs."""
        if layer.placed.device_map is not None:
            self.run_captured(layer, *batch)
        if is_largest:
            banks = (layer.experts.weights, layer.moe.pool.tensors, layer.placed.room.bank)
            layer.moe.rehearse(batch[0], [bank for bank in banks if bank and len(bank["w13_weight"])])
        return self.run_layer(layer, step, *batch)

    def run_layer(
        self,
        layer: RankLayer,
        step: RankStep,
        hidden_TH: torch.Tensor,
        gates_TK: torch.Tensor,
        ids_TK: torch.Tensor,
    ) -> torch.Tensor:
        """The routed experts' output [T, H]: this rank's partial sum in TP-EP, whole in DP-EP. Every rank enters it."""
        start = time.perf_counter()
        self._transport.where = f"step {self._step_number}, layer {layer.number}"
        rows = step.rows
        decide_plan = partial(self._decide, layer, step)
        moe = layer.moe
        plans = needs_counts(step.settings, step.step, layer.number, layer.placement)
        is_checked = is_sampled(self._step_number, step.settings.verify_sample_ratio)
        # Over gloo it costs next to nothing beside a batch that is planned; over NCCL it holds up the host once more.
        compare = is_checked or (plans and self._transport.device.type == "cpu")
        if self.is_replicated:
            result = moe.forward_replicated(
                hidden_TH[:rows], gates_TK[:rows], ids_TK[:rows], decide_plan, agree=plans, compare=compare
            )
        else:
            result = moe.forward_sharded(hidden_TH[:rows], gates_TK[:rows], ids_TK[:rows], decide_plan, compare=compare)
        is_verified = is_checked and result.plan.decision in (Decision.LEND, Decision.REPLICA)
        if is_verified:
            result = self._verified(layer, result, hidden_TH[:rows], gates_TK[:rows], ids_TK[:rows])
        is_counted = layer.index < len(self._info.layer_numbers)
        if step.is_real and is_counted and step.settings.mode is not Mode.OFF:
            self._record(layer, step, result, time.perf_counter() - start, is_verified=is_verified)
        if rows == len(hidden_TH):
            return result.output_TH
        output_TH = torch.zeros_like(hidden_TH)
        output_TH[:rows] = result.output_TH
        return output_TH

    def _verified(
        self,
        layer: RankLayer,
        result: LayerResult,
        hidden_TH: torch.Tensor,
        gates_TK: torch.Tensor,
        ids_TK: torch.Tensor,
    ) -> LayerResult:
        """`result` if plain EP computes the same; else plain EP's, and lending ends. Every rank enters it."""
        found = verify(layer.moe, result, hidden_TH, gates_TK, ids_TK, is_replicated=self.is_replicated)
        if found.is_equal:
            return result
        self._is_trusted = False
        self._map_captured()
        if self._window is not None:
            self._window.record_error("verify", "output_differs")
        logger.error(
            "llep: LENDING IS OFF until this engine restarts: at step %d, layer %d, the output differs from plain EP's "
            "by %.2g of the largest value, on at least one rank. Serving goes on with plain EP. Please report it with "
            "this log",
            self._step_number,
            layer.number,
            found.difference,
        )
        return found.plain

    def _decide(self, layer: RankLayer, step: RankStep, counts_QE: Counts) -> Plan:
        planned = self._plan(layer, step, counts_QE)
        if step.settings.mode is Mode.SHADOW:
            return plan_home(counts_QE.sum(axis=0).tolist(), layer.placement, planned.decision)
        return planned

    def _plan(self, layer: RankLayer, step: RankStep, counts_QE: Counts) -> Plan:
        counts_RE = np.zeros((self._transport.size, counts_QE.shape[1]), dtype=np.int64)
        counts_RE[: len(counts_QE)] = counts_QE
        if not self._is_trusted:
            return plan_home(counts_QE.sum(axis=0).tolist(), layer.placement, Decision.ERROR)
        settings = step.settings
        return decide(
            settings,
            step.step,
            layer.number,
            counts_RE,
            layer.placement,
            layer.placed.bytes_per_expert,
            self._ranks_per_node,
            self._cost_model,
            is_probe=settings.mode is Mode.ACTIVE
            and is_probe(self._step_number, settings.probe_ratio, settings.verify_sample_ratio),
        )

    def _record(
        self, layer: RankLayer, step: RankStep, result: LayerResult, seconds: float, *, is_verified: bool
    ) -> None:
        assert self._window is not None
        is_moved = step.settings.mode is not Mode.SHADOW
        planned = result.plan if is_moved else self._plan(layer, step, result.counts_RE)
        homes_E, ranks = layer.placement.home_rank_E, self._transport.size
        # As llep.loads.home_loads, in a tenth of the time: this is done for every layer of every step.
        loads = np.bincount(homes_E, weights=result.counts_RE.sum(axis=0), minlength=ranks).astype(np.int64).tolist()
        rank = self._transport.rank
        slots_used = sum(lend.dst_rank == rank for lend in planned.lends) if is_moved else 0
        if rank == 0 and planned.decision is Decision.LEND and not self._has_lent:
            self._has_lent = True
            logger.info(
                "llep: first step that %s: step %d, layer %d, %d lends, imbalance ratio %.2f -> %.2f",
                "lends" if is_moved else "would lend (shadow)",
                self._step_number,
                layer.number,
                len(planned.lends),
                imbalance_ratio(loads),
                imbalance_ratio(planned.rank_loads),
            )
        layer_step = LayerStep(
            step=self._step_number,
            phase=step.step.phase,
            layer=layer.index,
            counts_RE=result.counts_RE,
            planned=planned,
            home_loads=loads,
            is_moved=is_moved,
            is_verified=is_verified,
            times=result.times,
            seconds=seconds,
        )
        self._window.record(layer_step, slots_used)
        if self._recorder is not None:
            self._recorder.add(self._step_number, step.step.phase, layer.index, result.counts_RE)

    # -- what this rank tells ------------------------------------------------------------------------------------

    def report(self) -> Report:
        """This rank's view now; called by the courier's thread, also when a revision has arrived."""
        window = self._window
        assert window is not None
        self._report_seq += 1
        agreed = self.agreed
        if self._recorder is not None:
            self._recorder.release(agreed.held.recording)
        per_slot = self._info.bytes_per_slot
        workspace_bytes = sum(workspace.bytes for workspace in self._workspaces.values())
        room_bytes = sum(room.bytes for room in self._rooms.values())
        steady_bytes = workspace_bytes + self._replicas.used_bytes
        free_bytes, total_bytes = self._device_bytes()
        with window.lock:
            return Report(
                protocol=PROTOCOL,
                info=self._info,
                rank=self._transport.rank,
                incarnation=self._incarnation,
                seq=self._report_seq,
                time_s=time.time(),
                counting_s=time.monotonic() - self._counting_since_s,
                step=self._step_number,
                steps=dict(self._steps),
                held_revision=agreed.held.number,
                live_revision=agreed.live.number,
                live_settings=agreed.live.settings.dump(),
                live_since_step=agreed.live_since_step,
                live_since_time_s=agreed.live_since_time_s,
                last_apply_error=agreed.last_error,
                live_placement=self._replicas.live_number,
                filled_placement=self._replicas.filled,
                phase_seconds=window.phase_seconds(),
                layer_seconds=dict(window.layer_seconds),
                worth=window.worth(),
                device_total_bytes=total_bytes,
                device_free_bytes=free_bytes,
                memory_budget_bytes=sum(pool.bytes for pool in self._pools.values()) + workspace_bytes + room_bytes,
                memory_used_bytes=window.slots_used * per_slot + steady_bytes,
                memory_peak_bytes=window.slots_peak * per_slot + workspace_bytes + self._replicas.peak_bytes,
                replica_bytes=room_bytes,
                errors=dict(window.errors),
                group=window.group_loads() if self._transport.rank == 0 else None,
            )

    def _wake_up(self) -> None:
        """What captured steps read lies where vLLM keeps weights, and may be lost: written anew, without replicas."""
        self._replicas.restore_maps()
        for layer in self.layers:
            layer.experts.restore_maps()

    def _check_placement(self, order: PlacementOrder) -> None:
        self._replicas.check(order, len(self._info.layer_numbers))

    def _times_weights_changed(self) -> int:
        """A number that grows whenever weights of experts are written on this rank; costs nothing without replicas."""
        if self.agreed.live.placement is None and self.agreed.held.placement is None:
            return 0
        return self.weights_taken + num_loads() + sum(layer.experts.writes for layer in self.layers)

    def _device_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of this rank's device, or its part of the host's; 0 where nobody says."""
        if self._transport.device.type == "cuda":
            return torch.cuda.mem_get_info(self._transport.device)
        sharing = self._machines.count(self._machines[self._transport.rank])
        return (available_host_bytes() or 0) // sharing, (total_host_bytes() or 0) // sharing


def is_mapped(config: VllmConfig, experts: VllmExperts) -> bool:
    """Whether replicas of this layer act in captured steps too."""
    parallel = config.parallel_config
    hears_all = parallel.data_parallel_size == 1 or parallel.all2all_backend in DEALING_BACKENDS
    return not config.model_config.enforce_eager and hears_all and experts.leaves_out


def _shape_of(weights: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in weights.items())


def _machine() -> str:
    """Its name, and which of all machines that have been given it."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def has_scheduler() -> bool:
    """Whether this engine was told where Ray is; without it no agent is started."""
    return bool(os.environ.get("LLEP_RAY_ADDRESS"))


def tokens_of(context: ForwardContext, num_tokens: int, part: int = 0) -> tuple[int | None, bool]:
    """(real tokens of this rank's batch, whether it has prefill); None for a dummy, profiling or warm-up batch.

    part: which of the parts of num_tokens this rank has of a batch that is dealt out over several.
    """
    metadata = context.attn_metadata
    if not metadata or is_dummy_run():
        return None, False
    assert isinstance(metadata, dict), "micro-batching (DBO) was refused at start"
    first = next(iter(metadata.values()))
    real_tokens = min(max(int(first.num_actual_tokens) - part * num_tokens, 0), num_tokens)
    # One query token per request is decode; anything longer is a prefill, or a chunk of one.
    longest = getattr(first, "max_query_len", None)
    is_prefill = longest > 1 if longest is not None else first.num_prefills > 0
    return real_tokens, bool(is_prefill)


def _rows(real_tokens: int | None, num_tokens: int, *, is_real: bool) -> int:
    """How many of a rank's tokens take part: of a batch that is made up none, but where all ranks' are."""
    return num_tokens if real_tokens is None and not is_real else real_tokens or 0


def _layer_number(layer_name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))

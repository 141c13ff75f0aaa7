"""llep's MoE layer in a torch program of one's own: every token wants experts of rank 0, and both ranks compute them.

    torchrun --nproc-per-node 2 examples/layer.py

On GPUs, with NCCL, `device` and the backend are all that changes.
"""

import os

import torch
import torch.distributed as dist

from llep.moe.layer import LeastLoadedMoE
from llep.moe.slots import LendingPool
from llep.moe.swiglu import ClampedSwiglu, SwigluExperts
from llep.moe.transport import Transport
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS, SLOTS = 8, 64, 128, 2, 512, 2


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")

    # The experts that live here: gpt-oss's, with biases and a clamped activation.
    local = EXPERTS // size
    experts = SwigluExperts(
        torch.randn(local, 2 * INTERMEDIATE, HIDDEN, device=device) / HIDDEN**0.5,
        torch.randn(local, HIDDEN, INTERMEDIATE, device=device) / INTERMEDIATE**0.5,
        gate_up_bias_E2I=torch.randn(local, 2 * INTERMEDIATE, device=device),
        down_bias_EH=torch.randn(local, HIDDEN, device=device),
        activation=ClampedSwiglu(alpha=1.702, limit=7.0),
    )

    # Once per process: the group, room for borrowed weights, room for rows. All layers share them.
    transport = Transport(range(size), device, watchdog_s=60)
    pool = LendingPool.reserve(experts.weights, SLOTS)
    workspace = Workspace.for_batches(TOKENS, TOP_K, size, device, is_replicated=False)

    # Once per layer: which rank owns each expert, and where it lies in that rank's weights.
    placement = Placement.linear(EXPERTS, size, SLOTS)
    local_ids = [expert % local for expert in range(EXPERTS)]
    layer = LeastLoadedMoE(experts, transport, pool, placement.home_rank, local_ids, workspace)

    # Each batch: this rank's tokens, what its router chose, and a plan that every rank makes of the same counts.
    hidden_TH = torch.randn(TOKENS, HIDDEN, device=device)
    ids_TK = torch.rand(TOKENS, local, device=device).topk(TOP_K).indices  # all at home on rank 0
    gates_TK = torch.full((TOKENS, TOP_K), 1 / TOP_K, device=device)
    options = PlanOptions(min_chunk_tokens=16)
    result = layer.forward_sharded(
        hidden_TH, gates_TK, ids_TK, lambda counts_RE: plan_step("quota", counts_RE, placement, options)
    )
    if rank == 0:
        routed = (result.counts_RE.sum(axis=0).reshape(size, local).sum(axis=1)).tolist()
        print(f"{tuple(result.output_TH.shape)} pairs routed to each rank {routed}, computed {result.plan.rank_loads}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

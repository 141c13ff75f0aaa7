"""vLLM worker extension: read a rank's report and hand it a directive over vLLM's own RPC, without a scheduler.

`--worker-extension-cls llep.vllm_plugin.worker.WorkerExtension`, then `collective_rpc("llep_report")`.
"""

from __future__ import annotations

from llep.messages import decode_directive, encode
from llep.vllm_plugin import runner


class WorkerExtension:
    """Mixed into vLLM's worker by vLLM."""

    def llep_report(self) -> bytes:
        """This rank's llep.messages.Report now, encoded; b'' where llep has nothing to do (no expert parallelism)."""
        rank = runner.this_rank()
        return b"" if rank is None else encode(rank.report())

    def llep_offer(self, directive: bytes) -> None:
        """Give this rank an encoded llep.messages.Directive; it is live from the step that all ranks hold it."""
        rank = runner.this_rank()
        if rank is not None:
            rank.agreed.offer(decode_directive(directive))

"""Loaded into vLLM's workers by tests that change settings while an engine serves."""

from __future__ import annotations

import json

from llep.messages import PROTOCOL, Directive, encode
from llep.vllm_plugin.worker import WorkerExtension


class Switch(WorkerExtension):
    def llep_switch(self, revision: str, settings: str) -> None:
        """Offer these settings, as JSON: /collective_rpc passes strings alone."""
        self.llep_offer(
            encode(Directive(protocol=PROTOCOL, engine="e", revision=int(revision), settings=json.loads(settings)))
        )

"""Does the control plane ever answer what its OpenAPI doesn't say? Schemathesis makes requests for every operation but
streams, valid and invalid, with an admin's key, a reader's and none; the first breach ends the run.

    python -m bench.http_fuzz [--cases 10000] [--append]

A breach: a 5xx, a status, content type or body that is not documented, or anything let in without a key.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench.record import add_record
from llep_server.config import ServerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from reporting import Engine
from running import Running, start

KEYS = {"admin": "fuzzing-admin-0123456789", "read": "fuzzing-read-0123456789", "none": ""}
STREAMS = frozenset({"/v1/loads/stream"})
OPEN = frozenset({"/livez", "/readyz", "/health", "/version"})
READING_POSTS = frozenset({"/v1/placement/suggest", "/v1/plans/simulate"})
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# What is there, so that not every id is unknown.
KNOWN = {"engine": "tiny", "id": "1"}


def fuzz(running: Running, cases: int, seed: int = 0) -> Counter[str]:
    """Answers by who asked and status. Raises what schemathesis or a check of ours finds."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if found.ok().path not in STREAMS]
    answers: Counter[str] = Counter()
    each = max(cases // (len(operations) * len(KEYS)), 1)
    for operation in operations:
        for who in KEYS:
            _fuzz_one(running, operation, who, each, seed, answers)
    return answers


def _fuzz_one(running: Running, operation: Any, who: str, cases: int, seed: int, answers: Counter[str]) -> None:
    modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    headers = {"Authorization": f"Bearer {KEYS[who]}"} if KEYS[who] else {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=st.one_of(modes), is_known=st.booleans())
    def one(case: Any, is_known: bool) -> None:
        if is_known:
            for place in (case.path_parameters, case.query):
                place.update({name: value for name, value in KNOWN.items() if place and name in place})
        made = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
        case.headers = {**made, **headers}
        response = case.call(base_url=running.url)
        answers[f"{who} {response.status_code}"] += 1
        _check_admission(who, case, response.status_code)
        # 503: as much as is allowed at once is being done; documented, and no failure.
        checks = CHECKS[1:] if response.status_code == 503 else CHECKS
        case.validate_response(response, checks=checks)

    one()


def _check_admission(who: str, case: Any, status: int) -> None:
    path, method = case.operation.path, case.method.upper()
    if who == "none" and path not in OPEN:
        assert status == 401, f"{method} {path} answered {status} without a key"
    if who == "read" and method != "GET" and path not in READING_POSTS:
        assert status == 403, f"{method} {path} answered {status} to a reader"


@contextlib.contextmanager
def guarded() -> Iterator[Running]:
    """A control plane with keys, and an engine that reports and does what it is told."""
    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys"
        keys_file.write_text("".join(f"{who} {who} {key}\n" for who, key in KEYS.items() if key))
        for running in start(ServerConfig(keys_file=keys_file), Path(folder) / "state"):
            engine, is_over = Engine(), threading.Event()

            running.report(engine)
            reporting = threading.Thread(target=_report, args=(running, engine, is_over))
            reporting.start()
            try:
                yield running
            finally:
                is_over.set()
                reporting.join()


def _report(running: Running, engine: Engine, is_over: threading.Event) -> None:
    while not is_over.wait(0.05):
        engine.run(tokens=64)
        running.report(engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add the line to bench/results/http_fuzz.jsonl")
    asked = parser.parse_args()
    started_s = time.monotonic()
    with guarded() as running:
        answers = fuzz(running, asked.cases, asked.seed)
    measured = {"cases": answers.total(), "seed": asked.seed, "seconds": round(time.monotonic() - started_s)}
    add_record("http_fuzz", {**measured, "answers": dict(sorted(answers.items()))}, append=asked.append)


if __name__ == "__main__":
    main()

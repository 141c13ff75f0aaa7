"""`python -m llep_server.job`: jobs come in as a line of JSON that says which, and its arguments in JSON; progress goes
out as lines, then a line that says how long the answer is, and the answer, which the control plane need not parse.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llep.errors import LlepError
from llep_server.errors import InvalidRecording, InvalidRequest, MissingPackage
from llep_server.schemas import Simulation
from llep_server.simulation import check_cost_model, check_size, parse_object

logger = logging.getLogger(__name__)

NICENESS = 10  # the control plane comes first
PROGRESS_EVERY_S = 0.2

Progress = Callable[[float], None]


def question(arguments: dict[str, Any], progress: Progress) -> bytes:
    from llep.simulate.asked import answer_question

    check_cost_model(arguments.get("cost_model"))
    check_size(arguments)
    return _simulation(answer_question(arguments))


def replay(arguments: dict[str, Any], progress: Progress) -> bytes:
    from llep.simulate.asked import answer_replay

    check_cost_model(arguments["cost_model"])
    return _simulation(answer_replay(Path(arguments.pop("folder")), **arguments, on_progress=progress))


def tuning(arguments: dict[str, Any], progress: Progress) -> bytes:
    from llep.simulate.asked import answer_tuning

    check_cost_model(arguments["cost_model"])
    return json.dumps(answer_tuning(Path(arguments.pop("folder")), **arguments, on_progress=progress)).encode()


def _simulation(values: dict[str, Any]) -> bytes:
    return Simulation.model_validate(values).model_dump_json().encode()


JOBS: dict[str, Callable[[dict[str, Any], Progress], bytes]] = {
    "question": question,
    "replay": replay,
    "tuning": tuning,
}


def main() -> None:
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        answer, is_error = _done(job["kind"], sys.stdin.buffer.read(job["bytes"]))
        _say({"bytes": len(answer), "is_error": is_error}, answer)


def _done(kind: str, arguments: bytes) -> tuple[bytes, bool]:
    """The answer, and whether it is an error."""
    last_s = time.monotonic()

    def progress(ratio: float) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_EVERY_S:
            last_s = time.monotonic()
            _say({"progress": ratio})

    try:
        return JOBS[kind](parse_object(arguments), progress), False
    except ModuleNotFoundError as error:
        missing = MissingPackage(f"this needs the package {error.name}: pip install 'llep[planning]'")
        return _failed(missing)
    except LlepError as error:
        return _failed(error if error.code != "invalid_trace" else InvalidRecording(error.message, param="recording"))
    except OverflowError:
        return _failed(InvalidRequest("a number in it is too large to reckon with", param="body"))
    except MemoryError:
        return _failed(InvalidRecording("there is not enough memory for this: ask for less"))
    except Exception as error:
        logger.exception("%s failed", kind)
        return _failed(LlepError(f"the simulator failed: {type(error).__name__}; see the control plane's log"))


def _failed(error: LlepError) -> tuple[bytes, bool]:
    return json.dumps({"code": error.code, "message": error.message, "param": error.param}).encode(), True


def _say(line: dict[str, Any], answer: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n" + answer)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

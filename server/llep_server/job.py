"""`python -m llep_server.job`: jobs come in as a line that says which, and its arguments in JSON; progress, results and
errors go out as lines of JSON.
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
from llep_server.simulation import check_cost_model, check_size, parse_object

logger = logging.getLogger(__name__)

NICENESS = 10  # the control plane comes first
PROGRESS_EVERY_S = 0.2

Progress = Callable[[float], None]


def question(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from llep.simulate.asked import answer_question

    check_cost_model(arguments.get("cost_model"))
    check_size(arguments)
    return answer_question(arguments)


def replay(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from llep.simulate.asked import answer_replay

    check_cost_model(arguments["cost_model"])
    return answer_replay(Path(arguments.pop("folder")), **arguments, on_progress=progress)


def tuning(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from llep.simulate.asked import answer_tuning

    check_cost_model(arguments["cost_model"])
    return answer_tuning(Path(arguments.pop("folder")), **arguments, on_progress=progress)


JOBS: dict[str, Callable[[dict[str, Any], Progress], dict[str, Any]]] = {
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
        _say(_done(job["kind"], sys.stdin.buffer.read(job["bytes"])))


def _done(kind: str, arguments: bytes) -> dict[str, Any]:
    last_s = time.monotonic()

    def progress(ratio: float) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_EVERY_S:
            last_s = time.monotonic()
            _say({"progress": ratio})

    try:
        return {"result": JOBS[kind](parse_object(arguments), progress)}
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


def _failed(error: LlepError) -> dict[str, Any]:
    return {"error": error.code, "message": error.message, "param": error.param}


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()

"""`python -m llep_server.openapi > docs/openapi.json`: the description of the HTTP surface, as with a keys file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llep.errors import SchedulerUnreachable
from llep_server.app import create_app
from llep_server.config import ServerConfig


class _Nobody:
    async def call(self, method: str, **arguments: Any) -> Any:
        raise SchedulerUnreachable("this is only the description")


def description() -> dict[str, Any]:
    """What /openapi.json answers where there are keys."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("nobody read sha256:" + 64 * "0")
        return create_app(ServerConfig(keys_file=keys), _Nobody()).openapi()


if __name__ == "__main__":
    print(json.dumps(description(), indent=1))

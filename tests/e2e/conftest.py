"""A skewed model for all stacks, and folders whose paths leave room for unix sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llep.tiny_models import write_tiny_model
from tests.e2e.stack import LAYERS, TOP_K


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 93% of the pairs go to experts 0-7, which live on rank 0."""
    folder = tmp_path_factory.mktemp("e2e") / "model"
    return write_tiny_model(
        "gpt-oss", folder, hot=tuple(range(8)), hot_share=0.93, layers=LAYERS, top_k=TOP_K
    ).directory


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a path short enough for the unix sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)

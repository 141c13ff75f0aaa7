"""A platform for vLLM: CPUs that Ray hands out as if they were GPUs. On its own CPU platform vLLM refuses Ray.

`as_a_plugin` makes a folder for PYTHONPATH, of vLLM and of Ray alike, in which vLLM finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).parents[2]

if TYPE_CHECKING:
    CpuPlatform: Any = object
else:
    from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def platform() -> str:
    """Entry point in `vllm.platform_plugins`."""
    return f"{__name__}.{RayCpuPlatform.__name__}"


def as_a_plugin(folder: Path) -> str:
    """What PYTHONPATH must be for vLLM to find the platform."""
    about = folder / "ray_cpus-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpus\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nray_cpus = {__name__}:{platform.__name__}\n")
    return f"{folder}:{REPO}:{REPO / 'server'}"

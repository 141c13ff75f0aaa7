"""`llep calibrate`: measures this machine's device and writes the cost model that planners weigh lends with."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llep.cli.output import Format, show
from llep.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from llep.cost import CostModel, Link

NETWORK_LATENCY_S = 15e-6
DTYPES = ("float32", "bfloat16", "float16")
# (hidden, intermediate, tokens): DeepSeek-V3's expert on a GPU, a small one on a CPU.
CUDA_SHAPE = (7168, 2048, (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384))
CPU_SHAPE = (1024, 1024, (1, 4, 16, 64, 256, 1024, 2048))


def add_to(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate)


def calibrate(
    file: Annotated[Path, typer.Argument(help="Where to write the cost model.")] = Path("llep-cost.yaml"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    hidden: Annotated[int, typer.Option(min=0, help="Hidden size of the expert; 0: chosen for the device.")] = 0,
    intermediate: Annotated[int, typer.Option(min=0, help="Its width; 0: chosen for the device.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a rank; 0: torch's choice.")] = 0,
    network_gbit: Annotated[
        float, typer.Option("--network-gbit", help="Rate between nodes in Gb/s, which one machine can't measure.")
    ] = 100.0,
    output: Annotated[Format, typer.Option("-o", "--output", help="How to print what was measured.")] = Format.TABLE,
) -> None:
    """Measure an expert's GEMMs against tokens, lends against bytes, and planning; write them as a cost model.

    The file goes where a cost model is asked for: `llep simulate --cost-model FILE`, `"cost_model": FILE`.
    """
    if not network_gbit > 0:
        raise SettingsError(f"--network-gbit must be a number > 0, got {network_gbit}", param="network_gbit")
    if not file.parent.is_dir():
        raise SettingsError(f"{file} can't be written: {file.parent} is not a folder", param="file")
    model = _measured(_device(device), dtype, hidden, intermediate, threads, network_gbit)
    model.dump(file)
    rows: list[dict[str, object]] = [
        {"what": f"expert, {n} tokens", "seconds": f"{s:.3g}"} for n, s in model.gemm_curve
    ]
    rows += [
        {"what": "call of the experts", "seconds": f"{model.gemm_launch_s:.3g}"},
        {"what": "lend within a node", "seconds": _lend_text(model.node_link)},
        {"what": "lend between nodes (as told)", "seconds": _lend_text(model.network_link)},
        {"what": "step plan, 64 ranks x 256 experts", "seconds": f"{model.plan_s:.3g}"},
    ]
    show(rows, output, title=f"{model.name}: {model.source} -> {file}")


def _measured(
    device: torch.device, dtype: str | None, hidden: int, intermediate: int, threads: int, network_gbit: float
) -> CostModel:
    import torch

    from llep.cost import PRESETS, CostModel, Link
    from llep.moe.measure import CalibrationError, measure_gemm, measure_link

    is_cuda = device.type == "cuda"
    default_hidden, default_intermediate, tokens = CUDA_SHAPE if is_cuda else CPU_SHAPE
    dtype = dtype or ("bfloat16" if is_cuda else "float32")
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", param="dtype")
    if threads:
        torch.set_num_threads(threads)
    hidden, intermediate = hidden or default_hidden, intermediate or default_intermediate
    with _progress(len(tokens)) as on_point:
        gemm = measure_gemm(hidden, intermediate, getattr(torch, dtype), device, tokens, on_point)
    source = f"llep calibrate on {_device_name(device)}, SwiGLU {hidden} x {intermediate} in {dtype}"
    try:
        node_link = measure_link(device.type)
    except CalibrationError as error:
        node_link = PRESETS["h200"].node_link
        source += f"; node link not measured ({error}): the h200 preset's"
    return CostModel(
        name=device.type,
        source=f"{source}; network link as told, {network_gbit:g} Gb/s",
        expert_bytes=gemm.expert_bytes,
        gemm_curve=gemm.curve,
        gemm_launch_s=gemm.launch_s,
        node_link=node_link,
        # Between nodes it is not faster than within one, whatever the cable can do.
        network_link=Link(
            max(NETWORK_LATENCY_S, node_link.latency_s), min(network_gbit * 1e9 / 8, node_link.bytes_per_s)
        ),
        plan_s=_plan_s(),
    )


def _device(name: str | None) -> torch.device:
    try:
        import torch
    except ModuleNotFoundError:
        raise SettingsError("calibrate measures with torch: install llep[cpu], or llep[vllm] for GPUs") from None
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise SettingsError(f"--device must be cpu or cuda, got {name!r}", param="device")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no CUDA device here; take cpu", param="device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} with {torch.get_num_threads()} threads"


def _plan_s() -> float:
    """Median seconds of a step plan at 64 ranks x 256 experts."""
    from llep.generate import zipf_counts
    from llep.placement import Placement
    from llep.planning import PlanOptions, plan_step, warm_up

    warm_up()
    counts_RE, placement, options = zipf_counts(64, 256, 65536, 2.0, 0), Placement.linear(256, 64, 2), PlanOptions()
    times_s = []
    for _ in range(50):
        start_s = time.perf_counter()
        plan_step("quota", counts_RE, placement, options)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def _lend_text(link: Link) -> str:
    return f"{link.latency_s:.3g} + bytes / {link.bytes_per_s:.3g}"


@contextmanager
def _progress(points: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, plain lines otherwise; both on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda tokens: console.print(f"expert with {tokens} tokens measured")
        return
    with Progress(console=console) as bar:
        task = bar.add_task("experts", total=points)
        yield lambda tokens: bar.advance(task)

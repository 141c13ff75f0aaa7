"""`llep report`: a recording as one HTML page with a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llep.cli import complete
from llep.cli.http import DEFAULT_SERVER, KeyFileOption, ServerOption
from llep.cli.plan import needs_planning
from llep.cli.progress import progress
from llep.cli.record import at_hand
from llep.errors import SettingsError

if TYPE_CHECKING:
    from llep.shapes import StepCounts

RanksOption = Annotated[int | None, typer.Option("--ranks", help="Ranks to judge on; the recording's.")]
RecordingArgument = Annotated[
    str,
    typer.Argument(
        help="A recording: its folder, one part, the .tar of an export, or its id at the server.",
        autocompletion=complete.recordings,
    ),
]
SlotsOption = Annotated[int, typer.Option("--slots-per-rank", help="Experts that each rank can borrow now.")]
CostOption = Annotated[
    str, typer.Option("--cost-model", help="h100, h200, b200, a file of `llep calibrate`, or none: count pairs only.")
]
NodeOption = Annotated[int | None, typer.Option("--ranks-per-node", help="Ranks of one node; all by default.")]
SizesOption = Annotated[
    str | None,
    typer.Option("--sizes-of", help="Give experts the size of gpt-oss-20b, gpt-oss-120b, deepseek-v3, kimi-k2, ..."),
]
TokensOption = Annotated[
    int | None, typer.Option("--tokens-per-rank", help="Scale every step to so many tokens a rank; as recorded if not.")
]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the settings that hold now; the defaults if not.")
]


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(
    recording: RecordingArgument,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    ranks: RanksOption = None,
    slots_per_rank: SlotsOption = 4,
    cost_model: CostOption = "h200",
    ranks_per_node: NodeOption = None,
    sizes_of: SizesOption = None,
    tokens_per_rank: TokensOption = None,
    settings: SettingOption = None,
) -> None:
    """Write one self-contained page: is lending worth it, with which settings, on how many ranks, and why.

    A file needs neither a server nor vLLM. The verdict is a prediction; `llep bench` measures.
    """
    if output.suffix.lower() not in (".html", ".htm") or not output.parent.is_dir():
        raise SettingsError(f"--output {str(output)!r} must be an .html file in a folder that is there", param="output")
    with needs_planning():
        from llep.planning import warm_up
        from llep.report import analyse, page
        from llep.traces import unpacked
    from llep.config import Settings, parse_assignments

    start = Settings.parse(parse_assignments(settings or []))
    with at_hand(recording, server, key_file) as path, unpacked(path) as folder, progress("report") as on_stage:
        warm_up()
        loads = Loads(folder, ranks, slots_per_rank, cost_model, ranks_per_node, sizes_of, tokens_per_rank)
        found = analyse(
            loads.steps(),
            loads.setup,
            source=Path(recording).name or recording,
            recorded_ranks=loads.recorded_ranks,
            start=start,
            notes=loads.notes,
            on_stage=on_stage,
        )
    output.write_text(page(found), encoding="utf-8")
    print(f"{found.tuning.verdict}: {found.tuning.reason}")
    print(f"wrote {output} ({output.stat().st_size / 1000:.0f} kB)")


class Loads:
    """A recording to be replayed: its steps, perhaps scaled, and the setup that the options ask for.

    Broken parts are left out; `notes` says so afterwards.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int | None,
        slots_per_rank: int,
        cost_model: str,
        ranks_per_node: int | None,
        sizes_of: str | None,
        tokens_per_rank: int | None,
    ) -> None:
        from llep.cost import cost_model as find_model
        from llep.planning import PlanOptions
        from llep.shapes import shape_of
        from llep.simulate import Setup
        from llep.traces import Trace

        self._trace = Trace(folder, skip_broken=True)
        self.recorded_ranks = self._trace.num_ranks
        shape = self._trace.shape
        if sizes_of is not None:
            like = shape_of(sizes_of)
            shape = replace(
                shape,
                hidden_size=like.hidden_size,
                intermediate_size=like.intermediate_size,
                bytes_per_expert=like.bytes_per_expert,
            )
        if tokens_per_rank is not None and tokens_per_rank < 1:
            raise SettingsError(f"--tokens-per-rank {tokens_per_rank} must be at least 1", param="tokens_per_rank")
        self._notes: list[str] = []
        if sizes_of is not None:
            self._notes.append(f"experts are taken to be as large as those of {sizes_of}")
        self._tokens = None if tokens_per_rank is None else tokens_per_rank * (ranks or self.recorded_ranks)
        if tokens_per_rank is not None:
            self._notes.append(f"every step is scaled to {tokens_per_rank:,} tokens per rank: shares as recorded")
        costs = None if cost_model == "none" else find_model(cost_model)
        try:
            options = PlanOptions(cost_model=costs, ranks_per_node=ranks_per_node)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        self.setup = Setup(
            shape=shape,
            num_ranks=ranks or self.recorded_ranks,
            slots_per_rank=min(slots_per_rank, shape.num_experts),
            options=options,
        )

    def steps(self) -> Iterator[StepCounts]:
        from llep.tune import step_tokens

        for step in self._trace.steps():
            tokens = step_tokens(step, self._trace.shape)
            if self._tokens is None or not tokens:
                yield step
            else:
                yield step._replace(counts_LRE=(step.counts_LRE * self._tokens + tokens // 2) // tokens)

    def notes(self) -> list[str]:
        """What a reader should know: what was assumed, and what was left out."""
        broken = [f"left out {part.path.name}: {part.reason}" for part in self._trace.broken]
        unfinished = [f"left out {path.name}, which was never finished" for path in self._trace.unfinished]
        return [*self._notes, *broken, *unfinished]

"""Everything that `study` measures, in processes of their own, as it is done."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from rich.progress import Progress

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.judge.records import Header, encode, header
from parity.run.supervisor import pool
from parity.study import dispatch, learning, simulate
from parity.study.dispatch import Dispatch
from parity.study.learning import Run, Tracking
from parity.study.simulate import Simulated
from parity.study.sweep import Figures, Plan, preset_routing, routings, sweep

# Counts drawn for one line of the simulation, unless steps are asked for: larger groups get fewer steps.
MOST_COUNTS = 2**24


@dataclass(frozen=True)
class Asked:
    """What to measure."""

    presets: Sequence[Case] = ()  # sweep these instead of the plan
    recordings: Sequence[str] = ("pydoc",)
    models: Sequence[str] = tuple(MODELS)
    tokens: int = 4096  # on a rank, in the simulation
    steps: int | None = None  # of the simulation; none: up to 1000, fewer for large groups
    learn: int = 0  # seeds
    learn_steps: int = 200
    dispatch: bool = True
    plan: Plan = Plan()


class Study(msgspec.Struct):
    """What was found."""

    header: Header
    figures: list[Figures] = []
    simulated: list[Simulated] = []
    dispatches: list[Dispatch] = []
    runs: list[Run] = []
    tracking: Tracking | None = None

    def lines(self) -> list[str]:
        """A JSON object a line."""
        found: list[Any] = [self.header, *self.figures, *self.simulated, *self.dispatches, *self.runs]
        return [encode(record) for record in [*found, *([self.tracking] if self.tracking else [])]]


def run_study(asked: Asked, bar: Progress) -> Study:
    """Sweep, simulate, run the small dispatch and, where asked, train. Whatever happens, no process is left."""
    study = Study(header([]))
    workers = min(os.cpu_count() or 1, 8)
    with pool(workers) as executor:
        jobs: dict[Future, tuple[str, int]] = {}

        def submit(part: str, work: Any) -> None:
            jobs[executor.submit(work)] = (part, len(jobs))

        if asked.learn:
            for job in learning.plan(asked.learn):
                submit("learn", partial(learning.train, *job, asked.learn_steps, learning.WINDOWS))
        made = [partial(preset_routing, case, 8) for case in asked.presets]
        for routing in made or routings(asked.plan, asked.recordings):
            submit("sweep", partial(_sweep, routing))
        for case in simulated_cases(asked):
            submit("simulate", partial(_simulate, case, asked.recordings, asked.steps))
        parts = [part for part, _ in jobs.values()]
        tasks = {part: bar.add_task(part, total=parts.count(part)) for part in dict.fromkeys(parts)}
        found: dict[int, Any] = {}
        for job in as_completed(jobs):
            part, number = jobs[job]
            found[number] = job.result()
            bar.advance(tasks[part])
    if asked.dispatch:
        task = bar.add_task("dispatch", total=1)
        study.dispatches = list(dispatch.run())
        bar.advance(task)
    for part, number in jobs.values():
        getattr(study, {"learn": "runs", "sweep": "figures", "simulate": "simulated"}[part]).extend(found[number])
    if study.runs:
        study.tracking = learning.tracking(study.runs)
    return study


def _sweep(routing: Any) -> list[Figures]:
    return list(sweep(routing()))


def simulated_cases(asked: Asked) -> list[Case]:
    """The models asked for, and the largest shape where all are."""
    wanted = simulate.cases(asked.tokens)
    return [case for case in wanted if case.name in asked.models or set(asked.models) >= set(MODELS)]


def _simulate(case: Case, recordings: Sequence[str], steps: int | None) -> list[Simulated]:
    """Even popularity, and for each recording its fitted skew; on the recording's own experts, its stretches too."""
    steps = steps or max(1, min(1000, MOST_COUNTS // (case.ranks * case.experts)))
    found = [simulate.simulate(case, simulate.zipf(case.experts, case.top_k, 0.0), steps)]
    for recording in recordings:
        fitted = simulate.fit(recording)
        found.append(simulate.simulate(case, fitted.popularity(case), steps))
        if case.ranks <= fitted.experts and fitted.experts % case.ranks == 0 and case.ranks == 8:
            own = replace(case, name=f"{case.name}, experts of {recording}", experts=fitted.experts, top_k=fitted.top_k)
            found.append(simulate.simulate(own, recording, steps))
    return found

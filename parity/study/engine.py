"""Run everything that `study` measures, in processes of their own."""

import os
from concurrent.futures import as_completed

from rich.progress import Progress

from parity.judge.records import header
from parity.run.supervisor import pool
from parity.study import dispatch, learning, simulate, sweep
from parity.study.part import Asked, Part, Study

# Parts in the order of the page. To add one, write a file with its record and list it here.
PARTS: tuple[Part, ...] = (sweep.PART, dispatch.PART, simulate.PART, learning.PART)


def run_study(asked: Asked, bar: Progress) -> Study:
    """Run every job of every part. No process is left running, even after an error."""
    study = Study(header([]))
    jobs = [(part, job) for part in PARTS for job in part.jobs(asked)]
    parts = [part for part, _ in jobs]
    tasks = {part.name: bar.add_task(part.name, total=parts.count(part)) for part in dict.fromkeys(parts)}
    found = [[] for _ in jobs]
    with pool(min(os.cpu_count() or 1, 8)) as executor:
        order = sorted(range(len(jobs)), key=lambda i: -parts[i].weight)
        running = {executor.submit(jobs[i][1]): i for i in order if not parts[i].alone}
        for done in as_completed(running):
            i = running[done]
            found[i] = done.result()
            bar.advance(tasks[parts[i].name])
    for i, (part, job) in enumerate(jobs):
        if part.alone:
            found[i] = job()
            bar.advance(tasks[part.name])
    study.records = [record for records in found for record in records]
    for part in PARTS:
        study.records += part.summary(study)
    return study

"""What `study` found: tables for people, plots, and one page that needs nothing else."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from parity.study.engine import Study
from parity.study.learning import Run
from parity.study.sweep import FACTORS, PER, PRIORITIES, Figures

SHOWN = ("1", "1.25", "2")  # capacity factors in the table


def print_study(console: Console, study: Study) -> None:
    """Drops by routing, loads at scale, learning."""
    if study.figures:
        console.print(drop_table(study.figures))
    if study.simulated:
        console.print()
        console.print(scale_table(study))
    if study.runs:
        console.print()
        console.print(learning_table(study))


def _table(title: str, columns: Iterable[str], left: int) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def by_routing(figures: Sequence[Figures]) -> dict[tuple, list[Figures]]:
    """Figures of each routing and shape."""
    groups: dict[tuple, list[Figures]] = {}
    for f in figures:
        groups.setdefault((f.routing, f.ranks, f.tokens, f.experts, f.top_k, f.width), []).append(f)
    return groups


def find(figures: Sequence[Figures], factor: str, per: str, priority: str = "token") -> Figures:
    """The one of a group with these."""
    return next(f for f in figures if (f.factor, f.per, f.priority) == (factor, per, priority))


def drop_table(figures: Sequence[Figures]) -> Table:
    """A line for each routing and kind of bin: capacity needed, and at some factors what drops and what is padding."""
    columns = ["routing", "bins", "P", "T", "E", "K", "needed: median", "p99", "worst"]
    table = _table(
        "Capacity factor at which nothing drops, over steps; % dropped (priority token) / % of rows padding",
        [*columns, *(f"at {factor}" for factor in SHOWN), "output off at 1"], 2,
    )  # fmt: skip
    for group in by_routing(figures).values():
        for per in PER:
            first, needed = find(group, "1", per), find(group, "1", per).needed
            cells = [first.routing, per, *map(str, (first.ranks, first.tokens, first.experts, first.top_k))]
            cells += [f"{n:.2f}" for n in (needed.median, needed.p99, needed.worst)]
            for factor in SHOWN:
                f = find(group, factor, per)
                cells.append(f"{100 * f.dropped:.1f}/{100 * f.padded:.0f}")
            table.add_row(*cells, "" if first.out_error is None else f"{100 * first.out_error:.1f}%")
    return table


def scale_table(study: Study) -> Table:
    """A line for each model, size and popularity. Modelled times stand beside what they drop."""
    columns = ["model", "popularity", "P", "steps", "busiest", "worst", "rank bins", "expert", "NVLink", "network",
               "dynamic", "1.25 rank", "1.25 expert"]  # fmt: skip
    title = (
        "Simulated: rows of the busiest rank over the mean (median, worst); capacity factor needed (p99); MB that the "
        "busiest sender sends;\nmodelled ms of a forward pass, dynamic, and static at 1.25 beside what that drops"
    )
    table = _table(title, columns, 2)
    for s in study.simulated:
        cells = [s.model, s.popularity, str(s.ranks), str(s.steps), f"{s.busiest.median:.2f}", f"{s.busiest.worst:.2f}"]
        cells += [f"{s.needed_rank.p99:.2f}", f"{s.needed_expert.p99:.2f}"]
        cells += [
            f"{s.nvlink_bytes / 1e6:.0f}",
            f"{s.network_bytes / 1e6:.0f}",
            f"{1e3 * s.dynamic_seconds.median:.2f}",
        ]
        for per in PER:
            static = next(t for t in s.static if (t.factor, t.per) == (1.25, per))
            cells.append(f"{1e3 * static.seconds:.2f} ({100 * static.dropped:.1f}%)")
        table.add_row(*cells)
    return table


def curves(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what differs but the seed; without draws of rounding errors."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.factor != "none", r.factor, r.layer, r.seed)):
        name = {"torch": "PyTorch, dropless", "jax": "JAX, dropless by capacity"}.get(run.layer)
        if not run.draw:
            groups.setdefault(name or f"capacity {run.factor}, {run.layer}", []).append(run)
    return groups


def learning_table(study: Study) -> Table:
    """Final losses with their spread over seeds."""
    bits = 1 / np.log(2)
    steps = len(study.runs[0].loss)
    t = study.tracking
    assert t is not None
    table = _table(
        f"Learning, {steps} steps, bits per byte: mean and range over seeds. JAX tracks PyTorch for {t.steps} steps, "
        f"at most {t.worst:.2f} of the allowance ({t.difference:.1g} of {t.allowed:.1g} nats)",
        ["layers", "seeds", "last 20 steps", "range", "held out", "range", "dropped"], 1,
    )  # fmt: skip
    for name, runs in curves(study.runs).items():
        last = [bits * float(np.mean(run.loss[-20:])) for run in runs]
        held = [bits * run.held_out for run in runs if run.held_out is not None]
        table.add_row(
            name, str(len(runs)), f"{np.mean(last):.3f}", _range(last), f"{np.mean(held):.3f}" if held else "",
            _range(held), f"{100 * float(np.mean([np.mean(run.dropped) for run in runs])):.1f}%",
        )  # fmt: skip
    return table


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f}-{max(values):.3f}" if values else ""


# ---- Plots

DROPS = "Assignments dropped against the capacity factor, with a bin per rank and a bin per expert, priority token."
POSITIONS = "Assignments dropped in each tenth of a rank's tokens in order, capacity factor 1, a bin per rank."
ERRORS = "Relative error of the output and of the tokens' gradient against the dropless layer, by share dropped."
SCALE = "Simulated capacity factor at which nothing drops in 99 of 100 steps, a bin per rank, against ranks."
LEARNING = "Training loss of each layer: means of 10 steps and of seeds, and in the band the range over seeds."


def plots(study: Study) -> dict[str, tuple[str, str]]:
    """By file name: SVG, and what it shows in a sentence."""
    found = {}
    skewed = {k: g for k, g in by_routing(study.figures).items() if find(g, "1", "rank").out_error is not None}
    if skewed:
        found["drops.svg"] = _drops(skewed), DROPS
        found["positions.svg"] = _positions(skewed), POSITIONS
        found["errors.svg"] = _errors(study.figures), ERRORS
    if study.simulated:
        found["scale.svg"] = _scale(study), SCALE
    if study.runs:
        found["learning.svg"] = _learning(study), LEARNING
    return found


def _axes(n: int, height: float = 3.4):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * n, height), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure) -> str:
    import io

    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "parity", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _label(f: Figures) -> str:
    return f"{f.routing}, P={f.ranks} T={f.tokens} E={f.experts} K={f.top_k}"


def _base(groups: dict[tuple, list[Figures]]) -> list[list[Figures]]:
    """Recordings and those of the commonest shape, which differ in skew only."""
    shapes = [key[1:] for key in groups]
    common = max(shapes, key=shapes.count)
    return [g for key, g in groups.items() if key[1:] == common or not key[0].startswith("zipf")][:8]


def _drops(groups: dict[tuple, list[Figures]]) -> str:
    figure, axes = _axes(2)
    for ax, per in zip(axes, PER, strict=True):
        for group in _base(groups):
            points = [find(group, factor, per) for factor in FACTORS]
            ax.plot(
                [float(p.factor) for p in points],
                [100 * p.dropped for p in points],
                "o-",
                ms=3,
                label=_label(points[0]),
            )
        ax.set(title=f"a bin per {per}", xlabel="capacity factor", ylabel="dropped, %")
    axes[0].legend(fontsize=7, frameon=False)
    return _svg(figure)


def _positions(groups: dict[tuple, list[Figures]]) -> str:
    figure, axes = _axes(1)
    group = _base(groups)[len(_base(groups)) // 2]
    for priority in PRIORITIES:
        f = find(group, "1", "rank", priority)
        axes[0].plot(np.arange(5, 100, 10), [100 * r for r in f.dropped_by_position], "o-", ms=3, label=priority)
    axes[0].set(title=_label(group[0]), xlabel="position in the rank's tokens, %", ylabel="dropped, %", ylim=(0, None))
    axes[0].legend(title="priority", frameon=False)
    return _svg(figure)


def _errors(figures: Sequence[Figures]) -> str:
    figure, axes = _axes(2)
    for ax, name, what in zip(axes, ("out_error", "dx_error"), ("output", "tokens' gradient"), strict=True):
        for priority, marker in zip(PRIORITIES, "o^s", strict=True):
            points = [(f.dropped, getattr(f, name)) for f in figures if f.priority == priority]
            ax.plot(*(100 * np.array(points, float).T), marker, ms=3, alpha=0.5, label=priority)
        ax.set(title=f"error of the {what}", xlabel="dropped, %", ylabel="relative error in L2, %")
    axes[0].legend(title="priority", frameon=False)
    return _svg(figure)


def _scale(study: Study) -> str:
    figure, axes = _axes(2)
    for ax, even in zip(axes, (True, False), strict=True):
        names = dict.fromkeys(s.model for s in study.simulated if "," not in s.model)
        for name in names:
            of = [s for s in study.simulated if s.model == name and (s.popularity == "zipf 0") == even]
            ax.plot([s.ranks for s in of], [s.needed_rank.p99 for s in of], "o-", ms=3, label=name)
        title = "even popularity" if even else "fitted popularity"
        ax.set(title=title, xlabel="ranks", ylabel="capacity factor needed, p99", xscale="log", yscale="log")
    axes[0].legend(fontsize=7, frameon=False)
    return _svg(figure)


def _learning(study: Study) -> str:
    groups = curves(study.runs)
    factors = list(dict.fromkeys(name.split(",")[0] for name in groups if name.startswith("capacity")))
    figure, axes = _axes(max(len(factors), 1))
    for ax, factor in zip(axes, factors or [""], strict=True):
        for name, runs in groups.items():
            if name.startswith("capacity") and not name.startswith(f"{factor},"):
                continue
            loss = np.array([run.loss for run in runs]) / np.log(2)
            n = loss.shape[1] // 10
            smooth = loss[:, : 10 * n].reshape(len(runs), n, 10).mean(axis=2)
            x = 10 * np.arange(n) + 5
            (line,) = ax.plot(x, smooth.mean(axis=0), lw=1, label=name.split(", ")[-1] if "cap" in name[:3] else name)
            ax.fill_between(x, smooth.min(axis=0), smooth.max(axis=0), alpha=0.15, color=line.get_color(), lw=0)
        ax.set(title=factor, xlabel="step", ylabel="loss, bits per byte")
        ax.legend(fontsize=7, frameon=False)
    return _svg(figure)


# ---- The page


def page(study: Study) -> str:
    """The page: the small dispatch to step through, figures to choose among, plots, and tables."""
    environment = Environment(
        loader=PackageLoader("parity", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pictures = [
        (base64.b64encode(svg.encode()).decode(), name.removesuffix(".svg"), caption)
        for name, (svg, caption) in plots(study).items()
    ]
    wanted = {d.skew for d in study.dispatches}
    base = [
        f for group in _base(by_routing(study.figures)) for f in group
        if f.routing in {f"zipf {skew:g}" for skew in wanted}
    ] if study.figures else []  # fmt: skip
    data = {"dispatches": study.dispatches, "figures": base}
    # Inside a script element only "</" and "<!--" could end or change it.
    embedded = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    return environment.get_template("study.html.j2").render(
        study=study, data=embedded, pictures=pictures, find=find, groups=by_routing(study.figures), shown=SHOWN,
        pers=PER,
    )  # fmt: skip


def write(study: Study, folder: Path) -> list[Path]:
    """The page, the plots and all figures, a JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"index.html": page(study), "study.jsonl": "\n".join(study.lines()) + "\n"}
    files |= {name: svg for name, (svg, _) in plots(study).items()}
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]

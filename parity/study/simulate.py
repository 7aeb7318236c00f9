"""Routing alone at the scale of real models: loads, capacities, bytes per link, and a modelled time per step.

No token moves. Each rank's tokens choose K of E experts; how many choose which expert decides everything here, so those
counts are drawn directly. Letters besides the layer's own: n steps, pi_E the chance that a token chooses an expert.

Modelled time of a forward pass, in seconds, of the slowest rank (each term the most over ranks):

    2 * (latency + max(rows out, rows in) * D * bytes / bandwidth)  stages 4 and 8, the longer of both links
    + rows * 6 * D * F / flops                                      stage 6: three matmuls
    + (6*N + 2*T) * D * bytes / copy                                stages 2, 5, 7, 9: rows read and written once

Static bins send and, where a bin is an expert's, multiply C rows whatever is in them. The links' inputs are `LINKS`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.presets import MODELS
from parity.cases.recording import case_of_recording, load_recording, recording_name, sizes_of_recording
from parity.oracle.tolerances import numpy_dtype
from parity.study.part import Asked, Part, Plot, Rows, Study, axes, plain, section, svg
from parity.study.routing import PER
from parity.study.sweep import BROUGHT, Figures, Spread, percent, recorded_case, rounded_up, spread

Array = np.ndarray


class Links(NamedTuple):
    """Per GPU and direction, in bytes and operations per second, and seconds."""

    nvlink: float
    network: float
    latency: float
    flops: float
    copy: float
    node: int = 8  # GPUs that share NVLink


# nvlink: half of 32768 x 7168 bfloat16 rows to the other of two H200s in 0.81 ms (NCCL all_to_all_single, measured).
# network: 400 Gb/s, one NDR InfiniBand port a GPU (nominal, not measured). latency: 20 us a collective (assumed).
# flops, copy: grouped_mm at R=32768, D=7168, F=2048, e=32, and a copy, both bfloat16 on one H100 (measured).
LINKS = Links(32768 * 7168 * 2 / 2 / 0.81e-3, 50e9, 20e-6, 853e12, 3.0e12)


@dataclass(frozen=True)
class Popularity:
    """The probability that tokens choose each expert, and how much it varies between ranks and steps."""

    name: str
    pi_E: Array  # sums to K
    concentration: float  # of a Dirichlet around pi / K that each rank draws in each step; infinite: always pi


class StaticTime(msgspec.Struct):
    """Static bins at one capacity factor: their time, and what they drop."""

    factor: float
    per: str
    seconds: float | None
    dropped: float


class Simulated(msgspec.Struct, tag_field="kind", tag="simulated"):
    """One model on `ranks` ranks. Loads are relative to the mean rank; seconds are modelled, for one forward pass.

    A recording may not say how wide its layer is: what follows from the width is None then.
    """

    model: str
    popularity: str
    ranks: int
    tokens: int
    experts: int
    top_k: int
    width: int | None
    hidden: int | None
    steps: int
    busiest: Spread  # rows that the busiest rank receives, relative to T*K
    needed_rank: Spread  # capacity factor at which nothing drops, a bin per rank
    needed_expert: Spread  # the same with a bin per expert
    nvlink_bytes: float | None  # sent by the busiest sender to others of its node, forward, mean over steps
    network_bytes: float | None  # the same to other nodes
    dynamic_seconds: Spread | None
    static: list[StaticTime]


def inclusion(weight_E: Array, top_k: int, draws: int = 20_000, seed: int = 0) -> Array:
    """[E], sums to K: how often each expert is among the K largest of log(weight) plus Gumbel noise, by sampling."""
    gumbel = np.random.default_rng([seed, 5]).gumbel(size=(draws, weight_E.size))
    chosen = np.argpartition(-(np.log(np.maximum(weight_E, 1e-12)) + gumbel), top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=weight_E.size) / draws


def zipf(experts: int, top_k: int, skew: float, concentration: float = np.inf, seed: int = 0) -> Popularity:
    """First choices by Zipf's law with this exponent; the popularity of each expert is drawn once."""
    weight_E = np.random.default_rng([seed, 6]).permutation(np.arange(1.0, experts + 1) ** -skew)
    varying = "" if np.isinf(concentration) else ", varying"
    return Popularity(f"zipf {skew:g}{varying}", inclusion(weight_E, top_k, seed=seed), concentration)


# Number of counts drawn for one row, unless --steps is given: larger groups get fewer steps.
MOST_COUNTS = 2**24
STRETCH = 64  # consecutive tokens whose routing is correlated


class Fitted(NamedTuple):
    """The fit to a recording's router: how uneven its loads are, and how much they vary between stretches."""

    skew: float
    concentration: float  # of one stretch
    experts: int
    top_k: int

    def popularity(self, case: Case, skew: float | None = None) -> Popularity:
        """The popularity for a layer of another size.

        A rank's tokens are T / STRETCH stretches, so the variance of their mean is smaller by that factor. An expert's
        share keeps the relative spread that it has in the recording, whose experts are fewer: both scale the
        concentration.
        """
        scale = max(case.tokens / STRETCH, 1) * case.experts / self.experts
        concentration = (self.concentration + 1) * scale - 1
        return zipf(case.experts, case.top_k, self.skew if skew is None else skew, concentration)


@lru_cache
def fit(recording: str) -> Fitted:
    """The Zipf exponent whose loads are nearest to a recording's, and the concentration over its stretches.

    Nearest in the sum of squared differences of sorted shares, over exponents 0 to 3 in steps of 0.05. Concentration by
    moments: over stretches of S tokens the variance of counts is that of independent tokens, times
    1 + (S*K - 1) / (c + 1); infinite where it is no more than theirs, or there are fewer than two stretches.

    Raises ValueError as `load_recording` does.
    """
    case = case_of_recording(Case(ranks=1, tokens=0, recording=recording))
    ids = load_recording(case)["expert_id"][0]
    K, E, size = case.top_k, case.experts, STRETCH
    share_E = np.sort(np.bincount(ids.reshape(-1), minlength=E) / ids.size)[::-1]
    exponents = np.arange(61) / 20
    off = [((np.sort(zipf(E, K, s).pi_E)[::-1] / K - share_E) ** 2).sum() for s in exponents]
    skew = float(exponents[int(np.argmin(off))])
    n = len(ids) // size
    if n < 2:
        return Fitted(skew, np.inf, E, K)
    counts_nE = np.stack([np.bincount(part.reshape(-1), minlength=E) for part in ids[: n * size].reshape(n, size, K)])
    pi_E = counts_nE.mean(axis=0) / size
    independent = (size * pi_E * (1 - pi_E)).sum()
    excess = counts_nE.var(axis=0, ddof=1).sum() / independent - 1
    return Fitted(skew, float((size * K - 1) / excess - 1) if excess > 0 else np.inf, E, K)


def draw_counts(popularity: Popularity, ranks: int, tokens: int, top_k: int, rng: np.random.Generator) -> Array:
    """[P, E]: how many of each rank's tokens choose each expert, in one step.

    Each count has the distribution that independent tokens give it, binomial(T, pi); that a token's choices add up to K
    is neglected, so rows in all differ a little from T*K (`tests/test_simulate.py` says by how much that matters).
    """
    pi_PE = np.broadcast_to(popularity.pi_E, (ranks, popularity.pi_E.size))
    if np.isfinite(popularity.concentration):
        share_PE = rng.gamma(np.maximum(popularity.concentration * pi_PE / top_k, 1e-9))
        pi_PE = np.minimum(top_k * share_PE / np.maximum(share_PE.sum(axis=1, keepdims=True), 1e-300), 1)
    return rng.binomial(tokens, pi_PE)


def recorded_counts(recording: str, ranks: int, tokens: int, rng: np.random.Generator) -> Iterator[Array]:
    """Endless [P, E] counts: each rank's tokens are stretches from random places of a recording (block bootstrap)."""
    case = case_of_recording(Case(ranks=1, tokens=0, recording=recording))
    ids, E, K = load_recording(case)["expert_id"][0], case.experts, case.top_k
    size = min(STRETCH, len(ids))
    # cumulative[i]: how often each expert was chosen by the tokens before i
    chosen = np.zeros((len(ids) + 1, E), np.int64)
    np.add.at(chosen, (np.repeat(np.arange(1, len(ids) + 1), K), ids.reshape(-1)), 1)
    cumulative = chosen.cumsum(axis=0)
    while True:
        counts_PE = np.zeros((ranks, E), np.int64)
        for length in [size] * (tokens // size) + [tokens % size] * (tokens % size > 0):
            start_P = rng.integers(len(ids) - length + 1, size=ranks)
            counts_PE += cumulative[start_P + length] - cumulative[start_P]
        yield counts_PE


def seconds_of(links: Links, case: Case, out_PP: Array, multiplied: float) -> float:
    """One forward pass by the formula above. out_PP[p, q]: rows from rank p to rank q; `multiplied`: most on a rank."""
    row = case.width * numpy_dtype(case.dtype).itemsize
    near, far = by_link(out_PP, links.node)
    most_near, most_far = (max(rows.sum(axis=1).max(), rows.sum(axis=0).max()) for rows in (near, far))
    exchange = links.latency + max(most_near * row / links.nvlink, most_far * row / links.network)
    experts = multiplied * 6 * case.width * case.hidden / links.flops
    N = case.tokens * case.top_k
    return float(2 * exchange + experts + (6 * N + 2 * case.tokens) * row / links.copy)


def by_link(out_PP: Array, node: int) -> tuple[Array, Array]:
    """Rows to other ranks of the same node, and to other nodes."""
    of = np.arange(len(out_PP)) // node
    same = of[:, None] == of[None]
    near = np.where(same, out_PP, 0)
    np.fill_diagonal(near, 0)
    return near, np.where(same, 0, out_PP)


def simulate(
    case: Case, source: Popularity | str, steps: int, factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0),
    links: Links = LINKS, seed: int = 0,
) -> Simulated:  # fmt: skip
    """Steps of a model's layer on `case.ranks` ranks, from a popularity or, by name, a recording's stretches."""
    P, T, E, K = case.ranks, case.tokens, case.experts, case.top_k
    rng = np.random.default_rng([seed, 7])
    recorded = recorded_counts(source, P, T, rng) if isinstance(source, str) else None
    row = case.width * numpy_dtype(case.dtype).itemsize
    busiest, needed, dynamic = np.zeros(steps), {per: np.zeros(steps) for per in PER}, np.zeros(steps)
    bins = {"rank": P, "expert": E}
    capacity = {(per, f): int(np.ceil(f * T * K / bins[per])) for per in PER for f in factors}
    kept, most_kept = dict.fromkeys(capacity, 0.0), dict.fromkeys(capacity, 0.0)
    sent, near_bytes, far_bytes = 0, 0.0, 0.0
    for step in range(steps):
        if isinstance(source, str):
            assert recorded is not None
            counts_PE = next(recorded)
        else:
            counts_PE = draw_counts(source, P, T, K, rng)
        out_PP = counts_PE.reshape(P, P, -1).sum(axis=2)
        received_P = out_PP.sum(axis=0)
        busiest[step] = received_P.max() / (T * K)
        sent += int(received_P.sum())
        for per, rows in (("rank", out_PP), ("expert", counts_PE)):
            needed[per][step] = rows.max() * bins[per] / (T * K)
            for factor in factors:
                kept_of_bin = np.minimum(rows, capacity[per, factor]).sum(axis=0)
                kept[per, factor] += kept_of_bin.sum()
                most_kept[per, factor] += kept_of_bin.reshape(P, -1).sum(axis=1).max() / steps
        near, far = by_link(out_PP, links.node)
        near_bytes += float(near.sum(axis=1).max()) * row / steps
        far_bytes += float(far.sum(axis=1).max()) * row / steps
        dynamic[step] = seconds_of(links, case, out_PP, received_P.max())

    def static(per: str, factor: float) -> StaticTime:
        to_each = capacity[per, factor] * bins[per] // P
        multiplied = P * to_each if per == "expert" else most_kept[per, factor]
        seconds = seconds_of(links, case, np.full((P, P), to_each), multiplied)
        return StaticTime(factor, per, seconds, float(1 - kept[per, factor] / max(sent, 1)))

    return Simulated(
        case.name, recording_name(source) if isinstance(source, str) else source.name, P, T, E, K, case.width,
        case.hidden, steps,
        spread(busiest), spread(needed["rank"]), spread(needed["expert"]), near_bytes, far_bytes, spread(dynamic),
        [static(per, factor) for per, factor in capacity],
    )  # fmt: skip


# A shape with as many experts as the largest group has ranks. It is no published model.
LARGEST = Case("512-experts", ranks=512, tokens=4096, width=4096, hidden=1024, experts=512, top_k=8, dtype="bfloat16")


def cases(tokens: int = 4096, ranks: int | None = None) -> list[Case]:
    """Each real model on one node and, where it has the experts, on 64 ranks and one expert a rank; and the largest.

    With `ranks`, each on so many, where its experts can be shared out evenly.
    """
    return [
        replace(model, ranks=P, tokens=tokens, pattern="random")
        for model in (*MODELS.values(), LARGEST)
        for P in sorted({ranks} if ranks else {LARGEST.ranks} if model is LARGEST else {8, 64, model.experts})
        if model.experts % P == 0
    ]  # fmt: skip


def simulated_cases(asked: Asked) -> list[Case]:
    """Cases of the models asked for, and the largest shape if all are; with --quick, only those of few ranks."""
    wanted = cases(asked.tokens or 4096, asked.ranks)
    if asked.quick and not asked.ranks:
        wanted = [case for case in wanted if case.ranks <= 64]
    return [case for case in wanted if case.name in asked.models or set(asked.models) >= set(MODELS)]


def popularities(case: Case, recordings: Sequence[str], steps: int | None) -> list[Simulated]:
    """Even popularity, and for each recording its fitted skew; on the recording's own experts, its stretches too."""
    steps = steps or max(1, min(1000, MOST_COUNTS // (case.ranks * case.experts)))
    found = [simulate(case, zipf(case.experts, case.top_k, 0.0), steps)]
    for recording in recordings:
        fitted = fit(recording)
        found.append(simulate(case, fitted.popularity(case), steps))
        if case.ranks <= fitted.experts and fitted.experts % case.ranks == 0 and case.ranks == 8:
            name = f"{case.name}, experts of {recording_name(recording)}"
            own = Case(
                name, ranks=8, tokens=case.tokens, width=case.width, hidden=case.hidden, dtype=case.dtype,
                experts=fitted.experts, top_k=fitted.top_k,
            )  # fmt: skip
            found.append(simulate(own, recording, steps))
    return found


def spread_out(recording: str, tokens: int, ranks: int | None, steps: int) -> list[Simulated]:
    """A recording's own layer on 2, 4, 8 ... or `ranks` ranks, whose tokens are stretches of the recording."""
    case = replace(case_of_recording(Case(ranks=1, tokens=0, recording=recording)), recording=None, tokens=tokens)
    sizes = [ranks] if ranks else [2**i for i in range(1, 10)]
    found = [
        simulate(replace(case, ranks=P, name=recording_name(recording)), recording, steps)
        for P in sizes if case.experts % P == 0
    ]  # fmt: skip
    fixed = sizes_of_recording(recording)
    for one in found:
        if "D" not in fixed:
            one.width = one.nvlink_bytes = one.network_bytes = None
        if not {"D", "F"} <= fixed:
            one.hidden = one.dynamic_seconds = None
            one.static = [StaticTime(t.factor, t.per, None, t.dropped) for t in one.static]
    return found


def jobs(asked: Asked) -> list[Callable[[], list[Simulated]]]:
    """The reader's recordings, with the sweep's tokens, each on more and more ranks; a model and size each."""
    steps = asked.steps or (20 if asked.quick else None)
    own = [
        partial(
            spread_out, recording, recorded_case(recording, asked.ranks, asked.tokens).tokens, asked.ranks,
            asked.steps or 200,
        )
        for recording in asked.recordings
    ]  # fmt: skip
    recordings = asked.recordings or (BROUGHT,)
    return own + [partial(popularities, case, recordings, steps) for case in simulated_cases(asked)]


# ---- The answer, tables and plots


def answer(study: Study) -> list[str]:
    """A sentence for each recording whose few steps were measured: what more steps with its loads need."""
    measured = {(f.routing, f.ranks, f.tokens) for f in study.of(Figures)}
    return [
        f"Over {s.steps} steps simulated with the loads of {s.model}, {'99%' if s.steps >= 100 else 'all'} drop "
        f"nothing at {rounded_up(s.needed_rank.p99)} with a bin per rank and {rounded_up(s.needed_expert.p99)} with a "
        "bin per expert. Use the larger of these figures and those measured."
        for s in study.of(Simulated)
        if s.model == s.popularity and (s.model, s.ranks, s.tokens) in measured
    ]


def widths(found: Sequence[Simulated]) -> dict[str, int | None]:
    """The recordings whose own layer is simulated, on stretches of themselves, and its width as far as they fix it."""
    return {s.model: s.width for s in found if s.model == s.popularity}


def _note(found: Sequence[Simulated], columns: Sequence[str]) -> str:
    """What the columns hold, as far as they are there, and at which width."""
    said = ["The capacity factor needed to drop nothing in 99% of steps (in all steps, where there are fewer than 100)"]
    if "dynamic ms" in columns:
        said.append("modelled ms of a forward pass, dynamic, and static beside what that drops")
    said.append("rows of the busiest rank over the mean rank's")
    if any(column.endswith("MB") for column in columns):
        said.append("MB that the busiest sender sends")
    own = widths(found)
    numbers = ["models at their own width, in bfloat16"] if {s.model for s in found} - own.keys() else []
    numbers += [f"{name} at its width of {width}, in float32" for name, width in own.items() if width]
    unknown = [name for name, width in own.items() if not width]
    numbers += [f"'-' for {', '.join(unknown)}, which does not say its width"] if unknown else []
    sized = {"dynamic ms", "NVLink MB"} & {*columns}
    return "; ".join(said) + "." + f" Times and bytes: {'; '.join(numbers)}." * bool(sized)


def scale_table(study: Study) -> Rows | None:
    """One row per model, size and popularity, with times at a factor of 1.25 beside what that drops."""
    if not (found := study.of(Simulated)):
        return None
    columns, rows = _table(found, (1.25,))
    return Rows(f"Simulated. {_note(found, columns)}", columns, rows, 3)


def _megabytes(sent: float | None) -> str:
    if sent is None:
        return "-"
    return f"{sent / 1e6:.0f}" if sent >= 1e7 or not sent else f"{sent / 1e6:.2g}"


def _table(found: Sequence[Simulated], factors: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Columns that would say nothing are left out: of bytes where none are sent, and of what nobody knows."""
    timed = any(s.dynamic_seconds for s in found)

    def static(s: Simulated) -> dict[str, str]:
        said = {}
        for t in s.static:
            if t.factor in factors:
                ms = "-" if t.seconds is None else f"{1e3 * t.seconds:.2f}"
                drops = percent(t.dropped)
                said[f"{'ms (drops)' if timed else 'drops'} at {t.factor:g}, {t.per} bins"] = (
                    f"{ms} ({drops})" if timed else drops
                )
        return said

    rows = [
        {
            "model": s.model, "popularity": s.popularity, "ranks": str(s.ranks), "tokens a rank": str(s.tokens),
            "needed, rank bins": rounded_up(s.needed_rank.p99), "needed, expert bins": rounded_up(s.needed_expert.p99),
            "dynamic ms": f"{1e3 * s.dynamic_seconds.median:.2f}" if s.dynamic_seconds else "-", **static(s),
            "busiest, median": f"{s.busiest.median:.2f}", "busiest, worst": f"{s.busiest.worst:.2f}",
            "NVLink MB": _megabytes(s.nvlink_bytes), "network MB": _megabytes(s.network_bytes),
            "steps": str(s.steps),
        }
        for s in found
    ]  # fmt: skip
    columns = [name for name in rows[0] if any(row[name] not in ("-", "0") for row in rows)]
    return columns, [[row[name] for name in columns] for row in rows]


def scale_section(study: Study) -> str:
    """The section of the page with this table, at more factors."""
    if not (found := study.of(Simulated)):
        return ""
    columns, rows = _table(found, (1.0, 1.25, 2.0))
    own = widths(found)
    title = "More steps with the recording's loads" if {s.model for s in found} <= own.keys() else "Real models"
    note = "Routing alone: no token was moved."
    if own:
        note += f" A recording has few steps: more were drawn from {', '.join(own)}, in stretches of {STRETCH} tokens."
    if "dynamic ms" in columns:
        note += (
            " Times are modelled, of one forward pass, from link speeds that were measured on one host or are nominal; "
            "a time stands beside what it drops."
        )
    return section("scale", f"{title}, by simulation", _note(found, columns), columns, rows, note=note)


def plots(study: Study) -> dict[str, Plot]:
    """The capacity that models need as they are spread over more ranks; the reader's own recording beside them."""
    models = [s for s in study.of(Simulated) if "," not in s.model]
    own = widths(models)
    found = {}
    for name, even in (("even", True), ("fitted", False)):
        if (
            not (of := [s for s in models if (s.popularity == "zipf 0") == even])
            or (even and own)
            or (own and len(of) < 2)
        ):
            continue
        figure, ax = axes()
        for label in dict.fromkeys((s.model, s.popularity) for s in of):
            line = [s for s in of if (s.model, s.popularity) == label]
            words = f"{label[0]}, itself" if label[0] in own else label[0]
            ax.plot([s.ranks for s in line], [s.needed_rank.p99 for s in line], marker="o", label=words)
        title = "even popularity" if even else "popularity fitted to a recording"
        title = title if {s.model for s in of} - own.keys() else "stretches of the recording"
        ax.set(title=title, xlabel="ranks", ylabel="capacity factor needed", xscale="log", yscale="log")
        plain(ax.xaxis, [s.ranks for s in of] if len({s.ranks for s in of}) < 6 else [8, 32, 128, 512])
        low, high = ax.get_ylim()
        ticks = (1, 1.1, 1.2, 1.4, 1.6, 2, 3) if high < 4 else (1, 2, 4, 8, 16, 32, 64, 128)
        plain(ax.yaxis, [tick for tick in ticks if low <= tick <= high])
        caption = (
            f"Simulated capacity factor at which nothing drops in 99% of steps, a bin per rank, against ranks; {title}."
        )
        found[f"scale-{name}.svg"] = Plot(svg(figure), caption)
    return found


PART = Part("simulate", jobs, answer=answer, table=scale_table, section=scale_section, plots=plots)

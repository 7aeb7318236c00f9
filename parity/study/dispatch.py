"""One small dispatch, run by both implementations: where each row lies at each stage, read from their arrays.

Every token's hidden state is different, so a row identifies its token, and the runs' own counts per expert say for
which of its experts it is. PyTorch runs dynamically as P processes over gloo, JAX with a static capacity under vmap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.cases.recording import case_of_recording
from parity.run.ending import temporary_folder
from parity.run.supervisor import pool
from parity.study.part import PAGES, Asked, Part, Study, script_data
from parity.study.routing import PRIORITIES, Routing, recorded_routing, zipf_routing

Array = np.ndarray

SKEWS = (0.0, 0.5, 1.0, 1.5, 2.0)
FACTORS = ("0.5", "0.75", "1", "1.5", "2")
CASE = Case("dispatch", ranks=2, tokens=6, experts=4, top_k=2, width=8, hidden=8)

# A row: [source rank, token, k], or none where it is padding.
Row = tuple[int, int, int] | None
Rows = list[list[Row]]


class Positions(msgspec.Struct):
    """Every row of each rank, in order."""

    grouped: Rows
    received: Rows
    expert_major: Rows


class Dispatch(msgspec.Struct, tag_field="kind", tag="dispatch"):
    """One routing, dispatched dynamically and with a static capacity. The way back reverses the way there."""

    routing: str
    experts: int
    expert_id: list[list[list[int]]]  # [P, T, K]
    score: list[list[list[float]]]
    dynamic: Positions
    static: dict[str, Positions]  # by "factor priority"
    dropped: dict[str, list[tuple[int, int, int]]]


def tokens(case: Case) -> Array:
    """[P, T, D]: hidden states, all different."""
    return np.random.default_rng([case.seed, 8]).standard_normal((case.ranks, case.tokens, case.width), np.float32)


def weights(case: Case) -> list[Array]:
    """Expert weights of all experts."""
    rng, (D, F, E) = np.random.default_rng([case.seed, 9]), (case.width, case.hidden, case.experts)
    return [rng.standard_normal(shape, np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]


def in_torch(rank: int, store: Path, routings: Sequence[Routing]) -> list[dict[str, Array]]:
    """The rows of one rank at each stage, for every routing."""
    import torch
    import torch.distributed as dist

    from torch_impl import Router, moe_layer
    from torch_impl.routing import Routing as Chosen
    from torch_impl.routing import count_per_expert

    torch.set_num_threads(1)
    P = routings[0].case.ranks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=P)
    found = []
    for routing in routings:
        case = routing.case
        x = torch.from_numpy(tokens(case)[rank])
        mine = [torch.from_numpy(w).chunk(P)[rank] for w in weights(case)]
        ids, score = (torch.from_numpy(a[0, rank]) for a in (routing.expert_id, routing.score))
        chosen = Chosen(score, ids, count_per_expert(ids, case.experts))
        stages = moe_layer(x, torch.zeros(case.width, case.experts), *mine, router=Router(case.top_k), routing=chosen)
        found.append(
            {
                "grouped": stages.grouped.x_ND.numpy(),
                "received": stages.received_RD.numpy(),
                "expert_major": stages.expert_major.x_RD.numpy(),
                "counts": stages.counts_Pe.numpy(),
                "y": stages.y_RD.numpy(),
                "rank_major": stages.rank_major_RD.numpy(),
                "returned": stages.returned_ND.numpy(),
                "out": stages.out_TD.numpy(),
            }
        )
    dist.destroy_process_group()
    return found


def in_jax(factor: str, priority: str, routings: Sequence[Routing]) -> list[dict[str, Array]]:
    """The rows of all ranks at each stage, and what they dropped, for every routing, with this capacity."""
    import jax
    import jax.numpy as jnp

    from jax_impl import Router, moe_layer, plan_capacity
    from jax_impl.routing import Routing as Chosen
    from jax_impl.routing import count_per_expert

    jax.config.update("jax_platforms", "cpu")

    @partial(jax.jit, static_argnums=0)
    def layer(case, *arguments):
        capacity = plan_capacity(factor, case.tokens, case.top_k, case.experts, case.ranks, "rank", priority)

        @partial(jax.vmap, axis_name="ranks")
        def of_rank(x, ids, score, *mine):
            chosen = Chosen(score, ids, count_per_expert(ids, case.experts))
            router = jnp.zeros((case.width, case.experts))
            stages = moe_layer(
                x, router, *mine, router=Router(case.top_k), capacity=capacity, routing=chosen, axis_name="ranks"
            )
            return {
                "grouped": stages.grouped.x_BCD,
                "received": stages.received_BCD,
                "expert_major": stages.expert_major.x_SD,
                "counts": stages.counts_Pe,
                "y": stages.y_SD,
                "rank_major": stages.rank_major_BCD,
                "returned": stages.returned_BCD,
                "out": stages.out_TD,
                "dropped": stages.grouped.slot_TK == stages.grouped.assignment_BC.size,
            }

        return of_rank(*arguments)

    found = []
    for r in routings:
        mine = [w.reshape(r.case.ranks, -1, *w.shape[1:]) for w in weights(r.case)]
        found.append(jax.device_get(layer(r.case, tokens(r.case), r.expert_id[0], r.score[0], *mine)))
    return found


def positions(routing: Routing, arrays: Sequence[dict[str, Array]], capacity: int | None) -> Positions:
    """Which row lies where on every rank. `capacity`: rows per bin, one bin per rank; None if rows are contiguous.

    Raises ValueError if a row belongs to no token, or the counts do not fit the rows.
    """
    case, P = routing.case, routing.case.ranks
    e = case.experts // P
    sent_PPe = np.stack([a["counts"] for a in arrays])  # [receiver, source, local expert]
    whose = {x.tobytes(): (p, t) for p, x_TD in enumerate(tokens(case)) for t, x in enumerate(x_TD)}

    def identify(rows: Array, expert: list[int]) -> list[Row]:
        """Identify the token of each row by its bits, and k by which choice of the token the expert is."""
        found: list[Row] = []
        for x, g in zip(rows.reshape(-1, case.width), expert, strict=True):
            if g < 0:
                if x.any():
                    raise ValueError(f"a row of padding holds {x}")
                found.append(None)
                continue
            p, t = whose[x.tobytes()]
            found.append((p, t, routing.expert_id[0, p, t].tolist().index(g)))
        return found

    def padded(experts: list[int], size: int) -> list[int]:
        return experts + [-1] * (size - len(experts) if capacity else 0)

    grouped, received, major = [], [], []
    for rank, a in enumerate(arrays):
        bins = [[q * e + j for j in range(e) for _ in range(sent_PPe[q, rank, j])] for q in range(P)]
        grouped.append(identify(a["grouped"], [g for b in bins for g in padded(b, capacity or 0)]))
        bins = [[rank * e + j for j in range(e) for _ in range(sent_PPe[rank, p, j])] for p in range(P)]
        received.append(identify(a["received"], [g for b in bins for g in padded(b, capacity or 0)]))
        rows = [rank * e + j for j in range(e) for p in range(P) for _ in range(sent_PPe[rank, p, j])]
        major.append(identify(a["expert_major"], padded(rows, P * (capacity or 0))))
    found = Positions(grouped, received, major)
    check_way_back(routing, arrays, found)
    return found


def check_way_back(routing: Routing, arrays: Sequence[dict[str, Array]], there: Positions) -> None:
    """Raise ValueError unless results return the way tokens came, bit for bit, and are summed by score."""
    D, result = routing.case.width, {}
    for rows, a in zip(there.expert_major, arrays, strict=True):
        result |= {row: y for row, y in zip(rows, a["y"].reshape(-1, D), strict=True) if row is not None}
    for name, of_ranks in (("rank_major", there.received), ("returned", there.grouped)):
        for rows, a in zip(of_ranks, arrays, strict=True):
            for row, y in zip(rows, a[name].reshape(-1, D), strict=True):
                if row is not None and y.tobytes() != result[row].tobytes():
                    raise ValueError(f"{name} holds another row than {row}")
    for p, a in enumerate(arrays):
        expected = np.zeros(a["out"].shape)
        for (source, t, k), y in result.items():
            if source == p:
                expected[t] += routing.score[0, p, t, k] * y
        if not np.allclose(a["out"], expected, rtol=1e-4, atol=1e-4):  # a lost result is off by 0.1 and more
            raise ValueError(f"the output of rank {p} is not its results weighted by score")


def drawn(skews: Sequence[float] = SKEWS) -> list[Routing]:
    """Small routings from even to skewed. The first rank's experts are the popular ones, in order."""
    # With this seed every expert gets as many rows of each rank where the skew is 0, and each skew drops more.
    return [zipf_routing(CASE, skew, 1, seed=331250) for skew in skews]


def recorded(recording: str) -> list[Routing]:
    """The first tokens of a recording, as many as the page can show; none if there are fewer than two."""
    whole = case_of_recording(Case(ranks=1, tokens=0, recording=recording))
    T = min(max(1, 16 // whole.top_k), CASE.tokens, whole.tokens // CASE.ranks)
    if not T:
        return []
    routing = recorded_routing(replace(whole, tokens=T * CASE.ranks), 1)
    ids, score = (a.reshape(1, CASE.ranks, T, -1) for a in (routing.expert_id, routing.score))
    # One more expert, which no token chose, if the experts do not divide evenly among ranks.
    experts = whole.experts + whole.experts % CASE.ranks
    case = Case("dispatch", ranks=CASE.ranks, tokens=T, experts=experts, top_k=whole.top_k, width=8, hidden=8)
    return [Routing(routing.name, case, ids, score)]


def run(routings: Sequence[Routing], factors: Sequence[str] = FACTORS) -> Iterator[Dispatch]:
    """Dispatch every routing dynamically in PyTorch, and statically in JAX with every factor and priority."""
    P, ways = CASE.ranks, [(factor, priority) for factor in factors for priority in PRIORITIES]
    with temporary_folder() as folder, pool(P) as executor:
        jobs = [executor.submit(in_torch, rank, folder / "store", routings) for rank in range(P)]
        of_torch = [job.result() for job in jobs]
        jobs = [executor.submit(in_jax, *way, routings) for way in ways]
        of_jax = [job.result() for job in jobs]
    for i, routing in enumerate(routings):
        static, dropped = {}, {}
        for (factor, priority), found in zip(ways, of_jax, strict=True):
            name, case = f"{factor} {priority}", replace(routing.case, capacity_factor=factor)
            by_rank = [{key: a[rank] for key, a in found[i].items()} for rank in range(P)]
            static[name] = positions(routing, by_rank, case.capacity)
            dropped[name] = [tuple(row) for row in np.argwhere(found[i]["dropped"]).tolist()]
        score = np.round(routing.score[0].astype(np.float64), 4).tolist()  # digits that agree on all machines
        yield Dispatch(
            routing.name, routing.case.experts, routing.expert_id[0].tolist(), score,
            positions(routing, [of_rank[i] for of_rank in of_torch], None), static, dropped,
        )  # fmt: skip


def jobs(asked: Asked) -> list[Callable[[], list[Dispatch]]]:
    """One job, which starts both frameworks; it uses the reader's own recordings, if any."""
    if not asked.dispatch:
        return []
    own = [routing for recording in asked.recordings for routing in recorded(recording)]
    return [lambda: list(run(own or drawn()))]


def section(study: Study) -> str:
    """The page's section in which to step through the dispatch."""
    if not (dispatches := study.of(Dispatch)):
        return ""
    return PAGES.get_template("dispatch.html.j2").render(data=script_data(dispatches), alone=False)


def page(dispatches: Sequence[Dispatch]) -> str:
    """The dispatch alone on a page, for a projector. The same runs give the same bytes."""
    return PAGES.get_template("projector.html.j2").render(data=script_data(dispatches), alone=True)


PART = Part("dispatch", jobs, alone=True, section=section)

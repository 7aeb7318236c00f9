"""One small dispatch, run by both implementations: which row lies where at each stage, read off what the runs made.

Every token's hidden state is different, so a row says whose it is, and the runs' own counts per expert say for which of
its experts. PyTorch runs dynamically as P processes over gloo, JAX with a static capacity under vmap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from parity.cases.case import Case
from parity.run.ending import temporary_folder
from parity.run.supervisor import pool
from parity.study.part import PAGES, Asked, Part, Study
from parity.study.routing import PRIORITIES, Routing, zipf_routing
from parity.study.sweep import Figures, by_routing, commonest

Array = np.ndarray

SKEWS = (0.0, 0.5, 1.0, 1.5, 2.0)
FACTORS = ("0.5", "0.75", "1", "1.5", "2")
CASE = Case("dispatch", ranks=2, tokens=6, experts=4, top_k=2, width=8, hidden=8)

# A row: [source rank, token, k], or none where it is padding.
Row = tuple[int, int, int] | None
Rows = list[list[Row]]


class Positions(msgspec.Struct):
    """Of each rank, every row in order."""

    grouped: Rows
    received: Rows
    expert_major: Rows


class Dispatch(msgspec.Struct, tag_field="kind", tag="dispatch"):
    """One routing, dispatched dynamically, and with a static capacity."""

    skew: float
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
    """What one rank's rows are at each stage, of every routing."""
    import torch
    import torch.distributed as dist

    from torch_impl import Router, moe_layer
    from torch_impl.routing import Routing as Chosen
    from torch_impl.routing import count_per_expert

    torch.set_num_threads(1)
    case = routings[0].case
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.ranks)
    x = torch.from_numpy(tokens(case)[rank])
    mine = [torch.from_numpy(w).chunk(case.ranks)[rank] for w in weights(case)]
    found = []
    for routing in routings:
        ids, score = (torch.from_numpy(a[0, rank]) for a in (routing.expert_id, routing.score))
        chosen = Chosen(score, ids, count_per_expert(ids, case.experts))
        stages = moe_layer(x, torch.zeros(case.width, case.experts), *mine, router=Router(case.top_k), routing=chosen)
        found.append(
            {
                "grouped": stages.grouped.x_ND.numpy(),
                "received": stages.received_RD.numpy(),
                "expert_major": stages.expert_major.x_RD.numpy(),
                "counts": stages.counts_Pe.numpy(),
            }
        )
    dist.destroy_process_group()
    return found


def in_jax(case: Case, routings: Sequence[Routing]) -> list[dict[str, Array]]:
    """What all ranks' rows are at each stage, and what they dropped, of every routing; `case` has the capacity."""
    import jax
    import jax.numpy as jnp

    from jax_impl import Router, moe_layer, plan_capacity
    from jax_impl.routing import Routing as Chosen
    from jax_impl.routing import count_per_expert

    jax.config.update("jax_platforms", "cpu")
    capacity = plan_capacity(
        case.capacity_factor, case.tokens, case.top_k, case.experts, case.ranks, case.capacity_per, case.priority
    )

    @jax.jit
    @partial(jax.vmap, axis_name="ranks")
    def layer(x, ids, score, *mine):
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
            "dropped": stages.grouped.slot_TK == stages.grouped.assignment_BC.size,
        }

    of_rank = [w.reshape(case.ranks, -1, *w.shape[1:]) for w in weights(case)]
    return [jax.device_get(layer(tokens(case), r.expert_id[0], r.score[0], *of_rank)) for r in routings]


def positions(routing: Routing, arrays: Sequence[dict[str, Array]], capacity: int | None) -> Positions:
    """Whose row lies where on every rank. `capacity`: rows per bin, one per rank, or none where rows follow on.

    Raises ValueError when a row is nobody's, or the counts do not fit the rows.
    """
    case, P = routing.case, routing.case.ranks
    e = case.experts // P
    sent_PPe = np.stack([a["counts"] for a in arrays])  # [receiver, source, local expert]
    whose = {x.tobytes(): (p, t) for p, x_TD in enumerate(tokens(case)) for t, x in enumerate(x_TD)}

    def identify(rows: Array, expert: list[int]) -> list[Row]:
        """The rows' tokens by their bits, and k by which of the token's choices the expert is."""
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
    return Positions(grouped, received, major)


def run(case: Case = CASE, skews: Sequence[float] = SKEWS, factors: Sequence[str] = FACTORS) -> Iterator[Dispatch]:
    """Every skew dispatched dynamically by PyTorch, and statically by JAX with every factor and priority."""
    routings = [zipf_routing(case, skew, 1, seed=1) for skew in skews]
    cases = [replace(case, capacity_factor=f, priority=p) for f in factors for p in PRIORITIES]
    with temporary_folder() as folder, pool(case.ranks) as executor:
        jobs = [executor.submit(in_torch, rank, folder / "store", routings) for rank in range(case.ranks)]
        of_torch = [job.result() for job in jobs]
        jobs = [executor.submit(in_jax, each, routings) for each in cases]
        of_jax = [job.result() for job in jobs]
    for i, routing in enumerate(routings):
        static, dropped = {}, {}
        for each, found in zip(cases, of_jax, strict=True):
            name = f"{each.capacity_factor} {each.priority}"
            by_rank = [{key: a[rank] for key, a in found[i].items()} for rank in range(case.ranks)]
            static[name] = positions(routing, by_rank, each.capacity)
            dropped[name] = [tuple(row) for row in np.argwhere(found[i]["dropped"]).tolist()]
        yield Dispatch(
            skews[i], routing.expert_id[0].tolist(), routing.score[0].tolist(),
            positions(routing, [of_rank[i] for of_rank in of_torch], None), static, dropped,
        )  # fmt: skip


def jobs(asked: Asked) -> list[Callable[[], list[Dispatch]]]:
    """One, which starts both frameworks."""
    return [lambda: list(run())] if asked.dispatch else []


def section(study: Study) -> str:
    """The dispatch to step through, beside what the sweep says of the same skews in a layer of more tokens."""
    if not (dispatches := study.of(Dispatch)):
        return ""
    wanted = {f"zipf {d.skew:g}" for d in dispatches}
    swept = [f for group in commonest(by_routing(study.of(Figures))) for f in group if f.routing in wanted]
    # Inside a script element only "</" and "<!--" could end or change it.
    data = msgspec.json.encode({"dispatches": dispatches, "figures": swept}).decode().replace("<", "\\u003c")
    return PAGES.get_template("dispatch.html.j2").render(data=data)


PART = Part("dispatch", jobs, alone=True, section=section)

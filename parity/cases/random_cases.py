"""Cases drawn at random: shapes, skews, capacities, bins, priorities, dtypes, degenerate sizes."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from typing import Any, get_args

import numpy as np

from parity.cases.case import Case, Dtype, Experts, Pattern, Router

# Cases in a row with the same shapes: JAX compiles them once, and compiling takes most of the time.
SHARED = 20


# What a random case has for a layer that has its options fixed: those of router and experts as by default.
PLAIN_OPTIONS = {name: getattr(Case(), name) for name in (*Router._fields, *Experts._fields) if name != "top_k"}
PLAIN_OPTIONS |= {"router_bias": False, "selection_bias": False, "expert_scale": False, "gated": True}
PLAIN_OPTIONS |= {"expert_bias": False, "shared_hidden": 0, "shared_score": False, "uneven": False}
PLAIN_OPTIONS |= {"capacity_factor": None}


def random_cases(n: int, seed: int, fixed: dict[str, Any], first: int = 0, shared: int = SHARED) -> list[Case]:
    """`n` cases of this seed, from number `first` on, with the fields in `fixed` as given.

    So many in a row as `shared` says have the same shapes.

    Raises ValueError when no case exists with what is fixed.
    """
    return list(islice(_cases(seed, fixed, shared), first, first + n))


def _cases(seed: int, fixed: dict[str, Any], shared: int) -> Iterator[Case]:
    for shape in count():
        rng = np.random.default_rng([seed, shape])
        base = _possible(lambda rng=rng: replace(Case(**(_shape(rng) | fixed)), pattern="random"))
        for i in range(shared):
            name = f"random-{seed}-{shape * shared + i:04d}"

            def vary(rng=rng, base=base, name=name) -> Case:
                return replace(base, **(_numbers(rng, base.dtype) | fixed | {"name": name}))

            yield _possible(vary)


def _numbers(rng: np.random.Generator, dtype: Dtype) -> dict[str, Any]:
    """The fields that decide only the numbers."""
    return {
        "pattern": str(rng.choice(get_args(Pattern))),
        "seed": int(rng.integers(10**6)),
        "logit_scale": float(rng.choice([1, 1, 1, 8, 50])),
        "logit_offset": float(rng.choice([0, 0, 0, 20, -20, -46, 100])),
        # The largest float16 is 65504, and a SwiGLU squares an outlier: what overflows is not judged.
        "outlier": 1.0 if dtype == "float16" else float(rng.choice([1, 1, 1, 30, 300])),
    }


def _possible(draw: Callable[[], Case]) -> Case:
    """The first draw that is a case: K can exceed E, or a pattern want more experts than there are."""
    for _ in range(200):
        with suppress(ValueError):
            return draw()
    return draw()


def _shape(rng: np.random.Generator) -> dict[str, Any]:
    """Everything that decides the shapes and so the program."""

    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    def rarely(*values: Any) -> Any:
        """Mostly the first value, which is an option's default."""
        return one_of(values[0], values[0], values[0], *values)

    ranks = one_of(1, 2, 3, 4, 4, 8)
    experts = ranks * one_of(1, 2, 2, 3, 4)
    top_k = int(rng.integers(1, min(experts, 6) + 1))
    groups = rarely(1, *(n for n in (2, 4) if experts % n == 0 and experts // n > 1))
    most = [n for n in range(1, groups + 1) if groups == 1 or n * experts // groups >= top_k]
    gated = rarely(True, False)
    uneven = one_of(False, False, False, True)
    shared = 0 if uneven else rarely(0, 5, 24)
    return {
        "ranks": ranks,
        "experts": experts,
        "top_k": top_k,
        "tokens": one_of(0, 1, 2, 5, 8, 16, 16, 33),
        "width": one_of(1, 3, 4, 8, 16, 32),
        "hidden": one_of(1, 2, 5, 8, 24, 32),
        "dtype": one_of(*get_args(Dtype)),
        "score_function": one_of("softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen"),
        "renormalize": one_of(False, True),
        "epsilon": rarely(1e-20, 1e-6, 1e-3),
        "scale": one_of(1.0, 2.5),
        "groups": groups,
        "top_groups": one_of(*most),
        "group_score": one_of("top2", "max"),
        "outside_groups": one_of("minus_inf", "zero"),
        "score_on": rarely("output", *["input"] * (top_k == 1)),
        "router_dtype": rarely("wide", "float32", "activations"),
        "cast_scores": rarely(False, True),
        "router_bias": rarely(False, True),
        "selection_bias": rarely(False, True),
        "expert_scale": rarely(False, True),
        "activation": one_of("silu", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"),
        "clamp": rarely(None, 0.5, 7.0) if gated else None,
        "up_offset": rarely(0.0, 1.0) if gated else 0.0,
        "gated": gated,
        "expert_bias": rarely(False, True),
        "shared_hidden": shared,
        "shared_score": shared > 0 and one_of(False, True),
        "capacity_factor": one_of(None, None, "1/3", "0.5", "1", "1.25", "2.0"),
        "capacity_per": one_of("rank", "expert"),
        "priority": one_of("token", "choice", "score"),
        "align": one_of(1, 1, 8),
        "uneven": uneven,
    }

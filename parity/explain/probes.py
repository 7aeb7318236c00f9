"""Inputs chosen so that a layer's output identifies the layer.

    x = [v | u | offset | fine | c]       logit_g = c . code_g + offset + fine * (g odd)
    gate = v, up = u in every hidden unit     w_down[g] = 1 from hidden unit 0 to coordinate g, else 0

    out[t, g] = score[t, g] * activation(v) * u

So the output is a table of which token went to which expert with which weight. If the width has room, c holds a logit
for each expert, and the code is the identity. Otherwise a code of few coordinates maps c to logits, and several passes
show D experts each. All tokens of an experiment are in one batch, spread over ranks in order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import Parameters, parameters_of, shape
from parity.oracle.problem import Problem, draw, posed
from parity.oracle.tolerances import numpy_dtype

Array = np.ndarray

V, U, OFFSET, FINE, FEATURES = 0, 1, 2, 3, 4

# Gate and up in experiments that read scores: powers of two, at which each known activation is the identity or a
# square in every dtype, so that nothing is rounded. V0 is large for layers that multiply expert inputs by scores.
V0, U0 = 4096.0, 1.0
U0_ALONE = 64.0  # up for experts without a gate, as relu2 squares it

# Logits are multiples of 1/32 between -4 and 4, and codes are multiples of 1/4: bfloat16 holds both exactly.
STEP, MOST = 1 / 32, 4.0

SCAN = tuple(2.0**j for j in range(-2, 11))  # values of v and u, up to past every clamp of known models
BOTH = np.array([*SCAN, *(-size for size in SCAN)])  # SCAN with both signs
SHARED_SCORE = 0.25  # the shared expert's logit as a multiple of the first logit
BITS = range(1, 26)  # a float32 has 24
LEVEL = -8.0  # level of logits whose last bits are read: every score function is steep there
TOLD, REST = -4.0, -16.0  # logits of the experts chosen beside those at LEVEL, and of all others

# Range of a hidden unit's gate and up: different numbers on both sides of zero, where activations differ most.
STEEP = 3.0

MOST_TOKENS = 4096  # most tokens of a probe, reached when there are many experts


@dataclass
class Tokens:
    """Tokens of several experiments under one set of weights, and the position of each experiment."""

    case: Case
    rng: np.random.Generator
    code_CE: Array
    at: dict[str, slice] = field(default_factory=dict)
    rows: list[Array] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether each expert's logit is a coordinate of its own."""
        return self.code_CE.shape[0] == self.case.experts

    def add(self, name: str, c_nC: Array, **features: Array | float) -> None:
        """Add tokens with these c; v, u, offset and fine have their usual values unless given."""
        n = len(c_nC)
        x_nD = np.zeros((n, self.case.width))
        usual = {"v": V0, "u": U0 if self.case.gated else U0_ALONE, "offset": 0.0, "fine": 0.0} | features
        for place, feature in ((V, "v"), (U, "u"), (OFFSET, "offset"), (FINE, "fine")):
            x_nD[:, place] = usual[feature]
        x_nD[:, FEATURES : FEATURES + c_nC.shape[1]] = c_nC
        begin = sum(map(len, self.rows))
        self.at[name] = slice(begin, begin + n)
        self.rows.append(x_nD)

    def random(self, n: int) -> Array:
        """Draw c for n tokens with different logits; in the identity code all are distinct, up to 256 experts."""
        C = self.code_CE.shape[0]
        # In 16 bits, scores of large logits would be equal, such as sigmoid(3.9) and sigmoid(3.8).
        most = MOST if self.case.dtype in ("float32", "float64") else 0
        grid = np.arange(-MOST, most, STEP) if self.whole else np.arange(-2, 2, 1 / 8)
        rows = [self._clear(lambda: self.rng.choice(grid, C, replace=len(grid) < C)) for _ in range(n)]
        # With many experts, the largest logits of all tokens nearly coincide, so some tokens have them closer.
        nearer = [1, 2, 4] if self.case.experts > 64 else [1]
        return np.array(rows).reshape(n, C) / self.rng.choice(nearer, (n, 1))

    def _clear(self, draw: Callable[[], Array]) -> Array:
        """Draw a row whose largest logits all differ, if a hundred tries suffice."""
        tries = (draw() for _ in range(100))
        return next(row for i, row in enumerate(tries) if i == 99 or (np.diff(self._largest(row)) != 0).all())

    def _largest(self, row_C: Array) -> Array:
        return np.sort(row_C @ self.code_CE)[-self.case.top_k - 1 :]

    def descending(self, n: int, step: float) -> Array:
        """c for n equal tokens in which expert 0 has the largest logit, expert 1 the next, and so on."""
        if not self.whole:
            return np.tile(self.random(1), (n, 1))
        return np.tile(-step * np.arange(self.case.experts), (n, 1))


@dataclass
class Probes:
    """All probes of a layer, and what is known beforehand."""

    case: Case  # the case, with all inputs that the layer takes
    tokens: Tokens
    x_nD: Array  # tokens of all ranks, in order, in the case's dtype
    router_DE: Array
    hidden: tuple[Array, Array]  # for each hidden unit, gate/v and up/u in probes whose units differ
    combined_ED: Array  # output rows of experts in probes that sum over all coordinates
    learned: dict[str, Array]  # learned parameters that are not neutral in the probes about them
    problems: dict[str, Problem]

    @property
    def passes(self) -> int:
        """How many passes it takes to show all experts."""
        return math.ceil(self.case.experts / self.case.width)

    def logits(self, name: str) -> Array:
        """Exact logits of an experiment's tokens, [n, E]."""
        return self.x_nD[self.tokens.at[name]].astype(np.float64) @ self.router_DE


# Fields that say how the inputs of a case are drawn and how it is run, and nothing of the layer.
DRAWN = (
    "pattern", "logit_scale", "logit_offset", "outlier", "recording", "checkpoint", "layer", "uneven", "way",
)  # fmt: skip


def probing_case(base: Case, takes: tuple[str, ...]) -> Case:
    """The case to ask in: sizes, dtype, ranks and options of `base`, with all inputs that the layer takes.

    Raises ValueError if the width has no room for a probe, or the weights would fill memory.
    """
    if base.width < FEATURES + 2:
        raise ValueError(f"--width is {base.width}: asking a layer what it is needs at least {FEATURES + 2}")
    if base.real_size:
        raise ValueError(f"{base.name} is of real size: ask with a smaller --hidden, which does not change the answers")
    plain = Case()
    case = replace(base, name="probe", **{name: getattr(plain, name) for name in (*DRAWN, "seed")})
    if base.capacity_factor is not None:  # a capacity at which nothing drops: other probes show what is dropped
        case = replace(case, capacity_factor=str(base.experts))
    if not takes:
        return case
    has = {name: name in takes for name in ("router_bias", "selection_bias", "expert_scale", "shared_score")}
    shared = (base.shared_hidden or base.hidden) if "shared_w_up" in takes else 0
    gated = "w_gate" in takes and base.gated
    biased = "b_up" in takes and base.score_on == "output"  # no case has both
    return replace(case, gated=gated, expert_bias=biased, shared_hidden=shared, **has)


def make(case: Case, *, evaluated: bool = True) -> Probes:
    """Every probe of a case. The same case has the same ones on every machine.

    `evaluated`: include the oracle's values at every stage, for a layer that is fed them.
    """
    rng = np.random.default_rng(20)
    D, E, F, K = case.width, case.experts, case.hidden, case.top_k
    whole = D >= E + FEATURES
    code_CE = np.eye(E) if whole else rng.integers(-4, 5, (min(D - FEATURES, 16), E)) / 4
    router_DE = np.zeros((D, E))
    router_DE[OFFSET], router_DE[FINE, 1::2] = 1, 1
    router_DE[FEATURES : FEATURES + len(code_CE)] = code_CE
    tokens = Tokens(case, rng, code_CE)
    _experiments(tokens)

    T = math.ceil(sum(map(len, tokens.rows)) / case.ranks)
    fill = case.ranks * T - sum(map(len, tokens.rows))
    tokens.add("fill", tokens.random(fill))
    x_nD = np.concatenate(tokens.rows).astype(numpy_dtype(case.dtype))
    case = replace(case, tokens=T)
    steep = rng.permutation(np.linspace(-STEEP, STEEP, F + 2)[1:-1])
    sides = rng.choice([-1.0, 1.0], F) * rng.integers(2, 7, F) / 4
    hidden = (_narrow(case, steep), sides) if case.gated else (np.ones(F), _narrow(case, steep))
    combined_ED = rng.integers(-127, 128, (E, D)) / 128.0
    learned = {
        "router_bias": _on_grid(rng.permutation(np.arange(E) - E // 2) * (2 / E)),
        "selection_bias": rng.permutation(np.arange(E) - E // 2) * (1 / E),
        "expert_scale": rng.integers(2, 9, E) / 4,
        "b_gate": np.full((E, F), -0.5), "b_up": np.full((E, F), 0.25), "b_down": rng.integers(1, 9, (E, D)) / 8,
        "shared_w_gate": _one_row(case.width, case.shared_hidden, V, 1 / V0),
        "shared_w_up": _one_row(case.width, case.shared_hidden, U, 1.0 if case.gated else 1 / U0_ALONE),
        "shared_w_down": _one_row(case.shared_hidden, D, 0, 1.0),
        "shared_score": _one_row(case.width, 1, FEATURES, SHARED_SCORE)[:, 0],
    }  # fmt: skip
    found = Probes(case, tokens, x_nD, router_DE, hidden, combined_ED, learned, {})
    _pose(found, K, evaluated)
    return found


def _on_grid(a: Array) -> Array:
    """Round to the grid of logits, so that sums are exact in every dtype."""
    return np.round(a / STEP) * STEP


def _narrow(case: Case, a: Array) -> Array:
    return a.astype(numpy_dtype(case.dtype)).astype(np.float64)


def _one_row(D: int, H: int, place: int, value: float) -> Array:
    a = np.zeros((D, H))
    a[place : place + 1] = value
    return a


def _experiments(tokens: Tokens) -> None:
    """The tokens of every experiment; those that choose alike come last, as a capacity drops the last."""
    case, E, K = tokens.case, tokens.case.experts, tokens.case.top_k
    n = min(max(48, 2 * E), MOST_TOKENS)
    tokens.add("routing", tokens.random(n))
    if tokens.whole:
        one = tokens.rng.choice(np.arange(-MOST, -3, STEP), (E, E))
        np.fill_diagonal(one, MOST - STEP)
        tokens.add("one", one)
    near = tokens.descending(len(BOTH), 0.25)
    up = 1.0 if case.gated else BOTH
    tokens.add("gate scan", near, v=BOTH, u=up)
    tokens.add("up scan", near, v=2.0, u=BOTH)
    tokens.add("reference", near[:1], v=2.0, u=1.0)
    low = -np.arange(0.0, 87.0)  # down to where exp leaves the range of float32
    tokens.add("offset", tokens.descending(len(low), 1 / 64), offset=low)
    tokens.add("precision", tokens.descending(len(BITS), 0.25), u=np.array([1 + 2.0**-b for b in BITS]))
    if not tokens.whole:
        return
    tokens.add("ties", np.zeros((2, E)))
    for name, side in (("fine above", 1), ("fine below", -1)):
        c_nE = np.full((len(BITS), E), REST)
        c_nE[:, :2] = LEVEL
        c_nE[:, 2 : 1 + K] = TOLD
        tokens.add(name, c_nE, fine=side * np.array([2.0**-b for b in BITS]))


def weights(found: Probes, **changed: Array) -> Parameters:
    """Weights of a probe: neutral except for what is given."""
    case = found.case
    neutral = {"expert_scale": 1.0}
    w = {one.name: np.full(shape(case, one), neutral.get(one.name, 0.0)) for one in parameters_of(case)}
    w["router"] = found.router_DE
    if case.gated:
        w["w_gate"][:, V] = 1
    w["w_up"][:, U] = 1
    w |= changed
    kinds = {one.name: numpy_dtype(case.dtype_of(one.dtype)) for one in parameters_of(case)}
    return Parameters(**{name: a.astype(kinds[name]) for name, a in w.items()})


def shown(case: Case, which: int) -> Array:
    """w_down of a pass, [E, F, D]: experts from which * D on have a coordinate each."""
    w = np.zeros((case.experts, case.hidden, case.width))
    for g in range(which * case.width, min((which + 1) * case.width, case.experts)):
        w[g, 0, g - which * case.width] = 1
    return w


def problem_of(case: Case, x_nD: Array, w: Parameters, evaluated: bool) -> Problem:
    """A problem with these tokens of all ranks, in order. It does not say which rows to drop."""
    x_PTD = x_nD.reshape(case.ranks, case.tokens, case.width).astype(numpy_dtype(case.dtype))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        problem = posed(case, x_PTD, w, np.ones_like(x_PTD), evaluated=evaluated)
    return replace(problem, keep=np.ones_like(problem.keep))


def _pose(found: Probes, K: int, evaluated: bool) -> None:
    """Make all problems, by name."""
    case = found.case
    there = {one.name for one in parameters_of(case)}

    def put(name: str, w: Parameters, at: Case = case, x: Array = found.x_nD) -> None:
        of = replace(at, name=f"probe-{len(found.problems):02}-{name}")
        found.problems[name] = problem_of(of, x, w, evaluated)

    biases = {name: found.learned[name] for name in ("b_gate", "b_up") if name in there}
    for i in range(found.passes):
        w_down = shown(case, i)
        put(f"readout-{i}", weights(found, w_down=w_down))
        for name in ("router_bias", "selection_bias", "expert_scale"):
            if name in there:
                put(f"{name}-{i}", weights(found, w_down=w_down, **{name: found.learned[name]}))
        if case.expert_bias:
            put(f"expert_bias-{i}", weights(found, w_down=w_down, **biases))
        if K > 1:
            put(f"one_choice-{i}", weights(found, w_down=w_down), replace(case, top_k=1))
            other = replace(case, top_k=1, renormalize=not case.renormalize)  # ask both settings at K = 1
            put(f"one_choice_other-{i}", weights(found, w_down=w_down), other)
    gate, up = found.hidden
    scale = V0 if case.gated else 1.0
    different = {"w_up": _rows(case, U, up / (1 if case.gated else U0_ALONE))}
    different |= {"w_gate": _rows(case, V, gate / scale)} if case.gated else {}
    w_down = np.zeros((case.experts, case.hidden, case.width))
    for f in range(min(case.hidden, case.width)):
        w_down[:, f, f] = 1
    put("hidden", weights(found, w_down=w_down, **different))
    combined = np.zeros_like(w_down)
    combined[:, 0] = found.combined_ED
    put("combine", weights(found, w_down=combined))
    others = found.x_nD.reshape(case.ranks, case.tokens, case.width).copy()
    others[:, 1::2, V] /= 2  # scaled, so that sums over all rows differ from those of the first step
    others[:, 1::2, FEATURES:] *= -1  # negated logits route them to other experts
    put("company", weights(found, w_down=shown(case, 0), **biases), x=others)
    put("nothing", weights(found))
    if case.expert_bias:
        put("b_down", weights(found, b_down=found.learned["b_down"]))
    if case.shared_hidden:
        shared = {name: found.learned[name] for name in there if name.startswith("shared")}
        put("shared", weights(found, **shared))
        if case.gated:  # past every clamp
            put("shared_wide", weights(found, **shared | {"shared_w_gate": V0 * shared["shared_w_gate"]}))
    drawn = draw(replace(case, name=f"probe-{len(found.problems):02}-no-cotangent"))
    none = np.zeros_like(drawn.dout)
    found.problems["no-cotangent"] = posed(drawn.case, drawn.x, drawn.parameters, none, evaluated=evaluated)


def _rows(case: Case, place: int, value_F: Array) -> Array:
    w = np.zeros((case.experts, case.width, case.hidden))
    w[:, place] = value_F
    return w

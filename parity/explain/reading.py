"""Read each experiment: list its possible explanations, and decide which one holds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import Parameters, parameters_of
from parity.explain.ask import Answer
from parity.explain.hypotheses import MARGIN, Hypothesis, chosen_of, decide, residual, times, tolerance
from parity.explain.probes import BITS, BOTH, FEATURES, SCAN, SHARED_SCORE, U0, U0_ALONE, V0, Probes, V
from parity.judge.card import Finding
from parity.oracle import reference, vectorised
from parity.oracle.problem import parameters_in_float64
from parity.oracle.quantities import OUTSIDE
from parity.oracle.reference import Exact
from parity.oracle.tolerances import numpy_dtype

Array = np.ndarray
Function = Callable[[Array], Array]

HINTS = get_type_hints(Case)
SCORES = get_args(HINTS["score_function"])
SCORE_WORDS = {
    "softmax": "softmax over all experts",
    "sigmoid": "sigmoid",
    "sqrt_softplus": "square root of softplus",
    "softmax_of_chosen": "softmax over the chosen",
}

# Activations that no case can express.
ODD_ACTIVATIONS: dict[str, Function] = {
    "relu": lambda a: np.maximum(a, 0),
    "tanh": np.tanh,
    "sigmoid": reference.sigmoid,
    "no activation": lambda a: a,
}

BITS_OF_FLOAT32 = 16  # at least this many bits of a float32 expert output show despite other roundings

# Two ways for a case to express the same scores. A selection bias tells them apart, as it is added to other numbers.
SAME_SOFTMAX = (("softmax", True), ("softmax_of_chosen", False))

# How groups are ranked: the value of a case's `group_score`, and its words.
BEST_OF = {"top2": "the sum of the two largest", "max": "the largest score", "all": "the sum of all"}

ENOUGH = 64  # tokens used in the search over groups


class Layout(NamedTuple):
    """Which of our hidden units a layer takes as gate and as up."""

    what: str
    odd: bool
    of: Callable[[Array, Array], tuple[Array, Array]]


def _pairs(a: Array, b: Array) -> tuple[Array, Array]:
    both = np.concatenate([a, b])
    return both[0::2], both[1::2]


def _halves(a: Array, b: Array) -> tuple[Array, Array]:
    both = np.stack([a, b], -1).reshape(-1)
    return both[: len(a)], both[len(a) :]


def _swapped(a: Array, b: Array) -> tuple[Array, Array]:
    return b, a


class Clamp(NamedTuple):
    """Limits of gate and up."""

    least_gate: float
    most_gate: float
    least_up: float
    most_up: float

    def of(self, gate: Array, up: Array) -> tuple[Array, Array]:
        """Gate and up, clamped."""
        return np.clip(gate, self.least_gate, self.most_gate), np.clip(up, self.least_up, self.most_up)


FREE = Clamp(-math.inf, math.inf, -math.inf, math.inf)


def clamps(c: float) -> Iterable[tuple[str, Clamp]]:
    """Every clamp at c, by description: on none, one or both sides of gate and up."""
    sides = {"free": (-math.inf, math.inf), f"at most {c:g}": (-math.inf, c), f"within {c:g} of zero": (-c, c)}
    for (of_gate, gate), (of_up, up) in product(sides.items(), sides.items()):
        if (*gate, *up) != FREE:
            yield f"gate {of_gate}, up {of_up}", Clamp(*gate, *up)


LAYOUTS = (
    Layout("gate and up are where they belong", False, lambda a, b: (a, b)),
    Layout("gate and up are exchanged: the activation is on up", True, lambda a, b: (b, a)),
    Layout("gate and up, one after the other, are read as pairs", True, _pairs),
    Layout("gate and up, in pairs, are read one after the other", True, _halves),
    Layout(
        "gate and up, one after the other, are read as pairs and exchanged", True, lambda a, b: _swapped(*_pairs(a, b))
    ),
    Layout(
        "gate and up, in pairs, are read one after the other and exchanged", True, lambda a, b: _swapped(*_halves(a, b))
    ),
    Layout("the gate is taken for up, too", True, lambda a, _: (a, a)),
    Layout("up is taken for the gate, too", True, lambda _, b: (b, b)),
)


def activations(case: Case) -> dict[str, Function]:
    """Every activation that a case can express, by name."""
    exact = replace(case, dtype="float64", router_dtype="wide")

    def of(name: str) -> Function:
        return lambda a: reference.activated(replace(exact, activation=name), a, Exact())[0]

    return {name: of(name) for name in get_args(HINTS["activation"])}


def within_groups(score_nE: Array, groups: int, best: int, by: str, outside: str) -> Array:
    """Experts in the order in which a token takes them, [n, E]: those of its best groups first."""
    score_nGe = score_nE.reshape(len(score_nE), groups, -1)
    n_best = {"max": 1, "top2": 2, "all": score_nGe.shape[2]}[by]
    of_nG = -np.sort(-score_nGe, axis=2)[..., :n_best].sum(2)
    best_nG = np.argsort(-of_nG, axis=1, kind="stable")[:, :best]
    inside_nG = np.zeros(of_nG.shape, bool)
    np.put_along_axis(inside_nG, best_nG, True, 1)
    key_nGe = np.where(inside_nG[..., None], score_nGe, 0 if outside == "zero" else -np.inf)
    return np.argsort(-key_nGe.reshape(score_nE.shape), axis=1, kind="stable")


class Reading:
    """Makes findings from the answers to probes, in order: each uses what was found before."""

    def __init__(self, probes: Probes, answers: Mapping[str, Answer]) -> None:
        self.probes, self.answers, self.case = probes, answers, probes.case
        self.findings: list[Finding] = []
        self.tolerance = tolerance(self.case.dtype)
        self.fields: dict[str, Any] = {}
        self.act: Function = lambda a: a
        self.layout, self.offset = LAYOUTS[0], 0.0
        self.clamp = FREE
        self.broken: set[str] = set()  # probes whose outputs are NaN or infinite
        self.kept_K = np.ones(self.case.top_k, bool)  # which of the K choices the layer keeps
        self.always = 0  # how many experts a token has, if that is the same whatever the case asks for
        self.on_input = False
        self.residual_path = 0.0
        self.numbers_E = np.arange(self.case.experts)
        self.scale = 1.0
        self.score: Function | None = None  # maps logits [n, E] to the weights of all experts, once known

    def all(self) -> list[Finding]:
        """Every finding, in order."""
        for read in (
            self._repeatable,
            self._finite,
            self._beside,
            self._rounded,
            self._hidden,
            self._clamp,
            self._numbers,
            self._choice,
            self._score,
            self._epsilon,
            self._one_choice,
            self._ties,
            self._router_precision,
            self._expert_precision,
            self._combine,
            self._router_bias,
            self._selection_bias,
            self._expert_scale,
            self._expert_bias,
            self._b_down,
            self._shared,
            self._company,
            self._no_cotangent,
        ):
            with np.errstate(all="ignore"):
                read()
        return self.findings

    # ---- Shared by the experiments

    def _found(self, finding: Finding) -> Finding:
        self.findings.append(finding)
        if finding.state in ("found", "cannot tell"):
            self.fields |= finding.fields
        return finding

    def _said(self, key: str, what: str, state: Any = "found", **more: Any) -> Finding:
        return self._found(Finding(key, what, state, **more))

    def _decide(self, key: str, hypotheses: Iterable[Hypothesis], experiment: str, tolerance: float = 0.0) -> Finding:
        preferred = vars(self.case)
        return self._found(decide(key, list(hypotheses), tolerance or self.tolerance, experiment, preferred))

    def _out(self, probe: str) -> Array | None:
        """The output of a probe, [n, D], minus the tokens that the layer adds (a residual path)."""
        answer = self.answers.get(probe)
        if answer is None or answer.out is None or probe in self.broken:
            return None
        return answer.out - self.residual_path * self.probes.x_nD.astype(np.float64)

    def _table(self, probe: str, at: str) -> Array | None:
        """What each expert put into its coordinate, for an experiment's tokens, [n, E]."""
        passes = [self._out(f"{probe}-{i}") for i in range(self.probes.passes)]
        if any(out is None for out in passes):
            return None
        whole = np.concatenate([out for out in passes if out is not None], axis=1)[:, : self.case.experts]
        return whole[self.probes.tokens.at[at]][:, self.numbers_E]

    def _value(self, gate: Array | float, up: Array | float, bias: tuple[float, float] = (0.0, 0.0)) -> Array:
        """The output of a hidden unit for this gate and up, as far as it is known."""
        a, b = np.atleast_1d(np.asarray(gate, float)), np.atleast_1d(np.asarray(up, float))
        a, b = np.broadcast_arrays(a, b)
        if self.case.gated and "exchanged" in self.layout.what:
            a, b = b, a
        elif self.layout.odd:
            b = a
        if not self.case.gated:
            return self.act(b + bias[1])
        a, b = self.clamp.of(a + bias[0], b + bias[1])
        return self.act(a) * (b + self.offset)

    def usual(self) -> float:
        """The output of an expert, before its score, in experiments that read scores."""
        return float(self._value(V0, U0 if self.case.gated else U0_ALONE)[0])

    def _weights(self, probe: str, at: str) -> Array | None:
        """The weight of each expert for an experiment's tokens, [n, E]; 0 for experts that were not chosen."""
        table = self._table(probe, at)
        if table is None:
            return None
        weights = np.sqrt(np.maximum(table / self.usual(), 0)) if self.on_input else table / self.usual()
        if self.residual_path:
            weights[np.abs(weights) < 1e-6 * np.abs(weights).max(initial=0)] = 0
        return weights

    def _narrow(self, a: Array) -> Array:
        return a.astype(numpy_dtype(self.case.dtype)).astype(np.float64)

    def _said_case(self, **fields: Any) -> Case:
        """The asked case, changed to what was found so far, in float64."""
        known = {name: value for name, value in self.fields.items() if name != "top_k"}
        exact: dict[str, Any] = {"dtype": "float64", "router_dtype": "wide", "cast_scores": False, "scale": 1.0}
        exact |= {"expert_bias": False} if self.fields.get("score_on") == "input" else {}  # no case has both
        return replace(self.case, **(known | exact | fields))

    def _scores(self, case: Case, logits_nE: Array, w: Parameters | None = None) -> Array:
        """Weights by a case, without the scale, [n, E]; 0 for experts that are not chosen."""
        w = w or Parameters(np.zeros(0))
        logits = logits_nE[None]
        at = replace(case, ranks=1, tokens=len(logits_nE))
        if w.router_bias is not None:
            logits = logits + w.router_bias
        score = reference.scores(at, logits, Exact())
        ids = vectorised.select(at, score, w)
        weight = reference.chosen_scores(at, score, ids, w, Exact()).weight[0]
        return self._put(weight * self.kept_K if case.top_k == self.case.top_k else weight, ids[0])

    def _of(self, case: Case, logits_nE: Array, ids_nK: Array) -> Array:
        """Weights by a case, [n, K], of these experts."""
        at = replace(case, ranks=1, tokens=len(logits_nE), top_k=ids_nK.shape[1])
        score = reference.scores(at, logits_nE[None], Exact())
        return reference.chosen_scores(at, score, ids_nK[None], Parameters(np.zeros(0)), Exact()).weight[0]

    def _put(self, weight_nK: Array, ids_nK: Array) -> Array:
        weights = np.zeros((len(ids_nK), self.case.experts))
        np.put_along_axis(weights, ids_nK, weight_nK, 1)
        return weights

    # ---- The experiments

    def _repeatable(self) -> None:
        odd = [name for name, answer in self.answers.items() if answer.trace and not answer.repeats]
        said = f"no: two runs on the same inputs differ in {len(odd)} of {len(self.answers)}" if odd else "yes"
        self._said("repeatable", said, "odd" if odd else "found", experiment="each probe twice, all bits")

    def _finite(self) -> None:
        at = self.probes.tokens.at["routing"]
        outs = {name: self._out(name) for name in self.answers if not name.startswith(("capacity", "no-cotangent"))}
        self.broken = {name for name, out in outs.items() if out is not None and not np.isfinite(out[at]).all()}
        if self.broken:
            self._said(
                "finite",
                f"no: in {len(self.broken)} of {len(outs)} the output of tokens of usual size is infinite or NaN",
                "odd",
                experiment="each probe",
            )

    def _beside(self) -> None:
        out, x = self._out("nothing"), self.probes.x_nD.astype(np.float64)
        if out is None:
            return
        hypotheses = [
            Hypothesis("nothing", float(np.abs(out).max(initial=0)) / float(np.abs(x).max())),
            Hypothesis("the tokens themselves: a residual path", residual(out, x), odd=True),
        ]
        finding = self._decide("beside the experts", hypotheses, "w_down = 0")
        self.residual_path = float("residual path" in finding.what and finding.state == "odd")

    def _hidden(self) -> None:
        out = self._out("hidden")
        if out is None:
            return
        shown = min(self.case.hidden, self.case.width)
        rows = out[self.probes.tokens.at["routing"]]
        got_nF = rows[:, :shown]
        left, size, right = np.linalg.svd(got_nF, full_matrices=False)
        one_shape = residual(got_nF, size[0] * np.outer(left[:, 0], right[0]))
        h_F = right[0] * np.sign(left[:, 0].sum() or 1)
        gate, up = self.probes.hidden
        layouts = LAYOUTS if self.case.gated else LAYOUTS[:1]
        known = activations(self.case)
        on_output = [
            self._fit(h_F, name, f, layout, gate, up, shown)
            for name, f in (known | ODD_ACTIVATIONS).items()
            for layout in layouts
        ]
        on_input = list(self._fits_on_input(got_nF, known, gate, up, shown))
        best_input = min(on_input, key=lambda fit: fit[0].residual)
        where = [
            Hypothesis(
                "what an expert returns",
                max(one_shape, min(fit[0].residual for fit in on_output)),
                {"score_on": "output"},
            ),
            Hypothesis("what an expert is given", best_input[0].residual, {"score_on": "input"}, self.case.top_k > 1),
        ]
        finding = self._decide(
            "the score multiplies", where, "units of different gates and ups, several scores", MARGIN * self.tolerance
        )
        self.on_input = finding.fields.get("score_on") == "input" or (
            "is given" in finding.what and finding.state == "odd"
        )
        fits = on_input if self.on_input else on_output
        best = min(fits, key=lambda fit: fit[0].residual)
        by_layout = [
            Hypothesis(layout.what, min(fit[0].residual for fit in fits if fit[1] is layout), {}, layout.odd)
            for layout in layouts
            if any(fit[1] is layout for fit in fits)
        ]
        experiment = "units of different gates and ups"
        if self.case.gated:
            self._decide("gate and up", by_layout, experiment, MARGIN * self.tolerance)
        self._decide("activation", [fit[0] for fit in fits if fit[1] is best[1]], experiment, MARGIN * self.tolerance)
        name = self.fields.get("activation", best[0].fields.get("activation"))
        self.layout = best[1]
        self.act = (known | ODD_ACTIVATIONS).get(name or "") or (known | ODD_ACTIVATIONS)[best[0].what]
        if self.case.gated and not self.on_input:
            offset = next(fit[2] for fit in fits if fit[1] is best[1] and fit[0].what == (name or best[0].what))
            self.offset = _nice(offset, self.case.up_offset, MARGIN * self.tolerance)
            self._said(
                "added to up",
                "nothing" if self.offset == 0 else f"{self.offset:g}",
                experiment=experiment,
                fields={"up_offset": self.offset},
                numbers={"fitted": offset},
            )

    def _fit(
        self, h_F: Array, name: str, f: Function, layout: Layout, gate: Array, up: Array, shown: int
    ) -> tuple[Hypothesis, Layout, float]:
        """How well an activation explains hidden units, and the offset of up that fits best with it."""
        odd = name in ODD_ACTIVATIONS
        fields = {} if odd else {"activation": name}
        if not self.case.gated:
            expected = f(up)[:shown]
            return Hypothesis(name, residual(h_F, times(h_F, expected) * expected), fields, odd), layout, 0.0
        a, b = layout.of(gate, up)
        basis = np.stack([f(a) * b, f(a)], 1)[:shown]
        size, *_ = np.linalg.lstsq(basis, h_F, rcond=None)
        if size[0] == 0:
            return Hypothesis(name, math.inf, fields, odd), layout, 0.0
        fitted = float(size[1] / size[0])
        # With an offset of 1, an up near -1 magnifies any error in the offset: also try the nearest round number.
        offsets = dict.fromkeys((fitted, _nice(fitted, self.case.up_offset, MARGIN * self.tolerance)))
        off = {}
        for offset in offsets:
            expected = basis @ np.array([1, offset])
            off[offset] = residual(h_F, times(h_F, expected) * expected)
        offset = min(off, key=lambda one: off[one])
        return Hypothesis(name, off[offset], fields, odd), layout, offset

    def _fits_on_input(
        self, got_nF: Array, known: Mapping[str, Function], gate: Array, up: Array, shown: int
    ) -> Iterable[tuple[Hypothesis, Layout, float]]:
        logits = self.probes.logits("routing")
        for function in SCORES:
            for renormalize in (False, True):
                weights = self._scores(self._said_case(score_function=function, renormalize=renormalize), logits)
                s_nK = -np.sort(-weights, 1)[:, : self.case.top_k, None]
                for layout in LAYOUTS[:2] if self.case.gated else LAYOUTS[:1]:
                    a, b = layout.of(gate, up)
                    for name, f in known.items():
                        hidden = f(s_nK * a) * (s_nK * b) if self.case.gated else f(s_nK * b)
                        expected = hidden.sum(1)[:, :shown]
                        off = residual(got_nF, times(got_nF, expected) * expected)
                        yield Hypothesis(name, off, {"activation": name}), layout, 0.0

    def _clamp(self) -> None:
        gate_scan, up_scan = self._table("readout", "gate scan"), self._table("readout", "up scan")
        usual = self._table("readout", "reference")
        if gate_scan is None or up_scan is None or usual is None or self.on_input or self.layout.odd:
            return
        size = float(usual.sum()) / float(self._value(2.0, 1.0)[0])
        if size == 0:
            return
        of_gate, of_up = gate_scan.sum(1) / size, up_scan.sum(1) / size
        largest = SCAN[-1]
        if not self.case.gated:
            off = residual(of_up, self._value(0.0, BOTH))
            self._decide("clamp", [Hypothesis("none", off, {"clamp": None})], f"up from -{largest:g} to {largest:g}")
            return
        lifted = of_up / float(self.act(np.array(2.0))) - self.offset
        top, bottom = float(lifted[len(SCAN) - 1]), float(lifted[-1])
        gate_top = float(of_gate[len(SCAN) - 1]) / (1 + self.offset)
        limit = _inverse(self.act, gate_top)
        close = 4 * self.tolerance
        guess = [value for value in (limit, top, -bottom) if value < largest * (1 - close)]
        own = self.case.clamp
        c = _nice(float(np.median(guess)), own, close) if guess else math.inf
        # Negative gates give small outputs: in 16 bits, a smaller floor is needed to tell whether they are clamped.
        floor = 1e-4 if self.case.dtype in ("float32", "float64") else 1e-5
        options = {"none": FREE} | (dict(clamps(c)) if guess else {})
        hypotheses = []
        for what, option in options.items():
            self.clamp = option
            off = max(residual(of_gate, self._value(BOTH, 1.0), floor), residual(of_up, self._value(2.0, BOTH), floor))
            said = {"none": {"clamp": None}, f"gate at most {c:g}, up within {c:g} of zero": {"clamp": c}}.get(what)
            hypotheses.append(Hypothesis(what, off, said or {}, said is None))
        finding = self._decide("clamp", hypotheses, f"gate and up from -{largest:g} to {largest:g}", 2 * self.tolerance)
        self.clamp = options.get(chosen_of(finding), FREE)

    def _numbers(self) -> None:
        if not self.probes.tokens.whole:
            return
        table = self._table("readout", "one")
        if table is None:
            return
        first = np.abs(table).argmax(1)
        E = self.case.experts
        if (first == np.arange(E)).all():
            self._said("numbers of experts", "logit g leads to the weights of expert g", experiment="one large logit")
            return
        if sorted(first.tolist()) == list(range(E)):
            self.numbers_E = first
            shown = ", ".join(map(str, first[:16])) + ", ..." * (E > 16)
            self._said(
                "numbers of experts",
                f"other ones: logits 0, 1, ... lead to the weights of experts {shown}",
                "odd",
                experiment="one large logit",
            )
            return
        lost = np.flatnonzero(first != np.arange(E))[:8].tolist()
        self._said(
            "numbers of experts",
            f"unclear: a large logit of expert {lost} leads elsewhere",
            "unknown",
            experiment="one large logit",
        )

    def _choice(self) -> None:
        weights = self._weights("readout", "routing")
        if weights is None:
            return
        on, logits, K = weights != 0, self.probes.logits("routing"), self.case.top_k
        counts = sorted(set(on.sum(1).tolist()))
        largest = self._put(np.ones((len(logits), K)), self._largest(logits)) != 0
        lost = "" if counts == [K] else self._lost(on, logits)
        one = self._weights("one_choice", "routing")
        if K > 1 and one is not None and counts == [int(self.kept_K.sum())] and self.kept_K[: counts[0]].all():
            self.always = counts[0] * bool(((one != 0).sum(1) == counts[0]).all())
        if counts == [K]:
            self._said("experts of a token", f"{K}", experiment="random logits")
        elif lost:
            self._said("experts of a token", f"{counts[0]} of {K}: {lost}", "odd", experiment="random logits")
        elif counts[-1] == K and not (on & ~largest).any():
            fewer = int((on.sum(1) < K).sum())
            said = f"cannot tell: {K}, or fewer: {fewer} of {len(on)} tokens lack some, as if dropped"
            self._said("experts of a token", said, "cannot tell", experiment="random logits")
        else:
            shown = f"{counts[0]} to {counts[-1]}, where {K} are asked for"
            self._said("experts of a token", shown, "odd", experiment="random logits")
        if max(counts) == 0:
            return

        def off(case: Case, sign: float = 1.0) -> float:
            chosen = self._scores(case, sign * logits) != 0
            wrong = (on & ~chosen).any(1) | ((on.sum(1) == self.kept_K.sum()) & (on != chosen).any(1))
            return float(wrong.mean())

        by = replace(self._said_case(), groups=1, top_groups=1)
        # Experts whose score is 0 would look as if they were not chosen; in float64 no score is 0.
        by = replace(by, score_function="softmax_of_chosen", renormalize=False)
        hypotheses = [
            Hypothesis("those with the largest logits", off(by), {"groups": 1, "top_groups": 1}),
            Hypothesis("those with the smallest logits", off(by, -1.0), {}, odd=True),
        ]
        experiment = f"random logits of {len(logits)} tokens; residual: part of the tokens that is not explained"
        if hypotheses[0].residual > 0:
            hypotheses += list(self._groups(on[:ENOUGH], logits[:ENOUGH]))
        self._decide("choice", hypotheses, experiment, 1e-9)

    def _largest(self, logits: Array) -> Array:
        """The experts [n, K] that the asked case chooses, best first."""
        at = replace(self._said_case(renormalize=False), ranks=1, tokens=len(logits))
        return vectorised.select(at, reference.scores(at, logits[None], Exact()), Parameters(np.zeros(0)))[0]

    def _lost(self, on: Array, logits: Array) -> str:
        """Words for the choices that are lost in every token alike; an empty string if there are none."""
        there = np.take_along_axis(on, self._largest(logits), 1)
        if not there.any() or (there != there[0]).any() or (there.sum(1) != on.sum(1)).any():
            return ""
        self.kept_K = there[0]
        self.findings = [f for f in self.findings if f.state != "unknown" or f.key != "numbers of experts"]
        lost = [str(k + 1) for k in np.flatnonzero(~self.kept_K)]
        if self.kept_K[-1] and len(lost) == len(self.kept_K) - 1:
            return "only the last choice is there: the others are overwritten, or lost"
        last = not self.kept_K[-1] and len(lost) == 1
        return "the last choice is lost" if last else f"of the choices, best first, these are lost: {', '.join(lost)}"

    def _groups(self, on: Array, logits: Array) -> Iterable[Hypothesis]:
        E, K = self.case.experts, self.case.top_k
        options = [
            (groups, best, by, outside)
            for groups in range(2, E)
            if E % groups == 0
            for best in range(1, groups)
            if best * (E // groups) >= K
            for by in BEST_OF
            if E // groups > {"max": 0, "top2": 1, "all": 2}[by]  # smaller groups: another rule agrees
            for outside in ("minus_inf", "zero")
        ]
        for function in SCORES:
            at = replace(self._said_case(), score_function=function, ranks=1, tokens=len(logits))
            score = reference.scores(at, logits[None], Exact())[0]
            of = "logits" if function == "softmax_of_chosen" else SCORE_WORDS[function]
            for groups, best, by, outside in options:
                if outside == "zero" and function != "softmax_of_chosen":
                    continue  # all scores but logits are positive, so zero and minus infinity agree
                if by == "max" and outside == "minus_inf" and function != SCORES[0]:
                    continue  # all score functions have the same largest expert
                fields: dict[str, Any] = {"groups": groups, "top_groups": best, "group_score": by}
                if function == "softmax_of_chosen":  # other scores are positive: keep the asked case's value
                    fields["outside_groups"] = outside
                what = f"within the best {best} of {groups} groups, by {BEST_OF[by]}"
                what += "" if by == "max" and outside == "minus_inf" else f" of {of}"
                what += "; the others count as zero" * (outside == "zero")
                chosen = self._put(
                    np.tile(self.kept_K, (len(logits), 1)), within_groups(score, groups, best, by, outside)[:, :K]
                )
                off = float((on != (chosen != 0)).any(1).mean())
                yield Hypothesis(what, off, {} if by == "all" else fields, by == "all")

    def _ids(self, on: Array, logits: Array) -> tuple[Array, Array]:
        """Indices [n] of tokens that have K experts, and their expert ids [n, K], best first."""
        if not self.kept_K.all():
            return np.arange(len(on)), self._largest(logits)
        rows = np.flatnonzero(on.sum(1) == self.case.top_k)
        ordered = np.where(on[rows], -logits[rows], np.inf).argsort(1, kind="stable")
        return rows, ordered[:, : self.case.top_k]

    def _score(self) -> None:
        weights = self._weights("readout", "routing")
        if weights is None or not (weights != 0).any():
            return
        logits = self.probes.logits("routing")
        rows, ids = self._ids(weights != 0, logits)
        if not len(rows):
            self._said("scores", "unknown: no token has as many experts as it should", "unknown")
            return
        got, logits, K = np.take_along_axis(weights[rows], ids, 1)[:, self.kept_K], logits[rows], self.case.top_k
        hypotheses, factor = [], {}
        for function, renormalize in ((f, r) for f in SCORES for r in (False, True)):
            case = self._said_case(score_function=function, renormalize=renormalize)
            what = SCORE_WORDS[function] + ", renormalised" * renormalize
            if (function, renormalize) in SAME_SOFTMAX:
                what = "softmax over the chosen, or over all experts and renormalised, which is the same"
            if function == "softmax_of_chosen" and renormalize:
                continue  # softmax over the chosen sums to 1 already
            expected = self._of(case, logits, ids)
            every = reference.scores(replace(case, ranks=1, tokens=len(logits)), logits[None], Exact())[0].sum(1)
            fields = {"score_function": function, "renormalize": renormalize}
            for other, odd, a in (
                (what, False, expected),
                (f"square of: {what}", True, expected**2),
                (f"{what}, in the order of the worst first", True, expected[:, ::-1]),
                (f"{what}, of the next choice", True, np.roll(expected, 1, 1)),
                (f"{what}, over the sum of all experts", True, expected / every[:, None]),
            ):
                if K == 2 and other.endswith("of the next choice"):
                    continue  # for K = 2 this is the order of the worst first
                if other.endswith("sum of all experts") and (renormalize or function.startswith("softmax")):
                    continue  # these scores sum to 1 already
                a = a[:, self.kept_K]
                factor[other] = times(got, a)
                hypotheses.append(Hypothesis(other, residual(got, factor[other] * a), {} if odd else fields, odd))
        flat = np.ones_like(got)
        factor["the same for all"] = times(got, flat)
        hypotheses.append(Hypothesis("the same for all", residual(got, factor["the same for all"] * flat), {}, True))
        if K == 1:
            hypotheses = [h for h in hypotheses if not h.what.endswith(("first", "choice"))]
        finding = self._decide("scores", hypotheses, "random logits, all experts alike")
        if finding.state == "unknown":
            return
        fitted = factor[chosen_of(finding)]
        self.scale = _meant(fitted, self.case.scale, self.tolerance / math.sqrt(got.size))
        experiment, numbers = "by least squares over all of them", {"fitted": fitted}
        if self.layout.odd and self.scale != self.case.scale:
            said = "cannot tell: gate and up are elsewhere, and a clamp there would look like a scale"
            self._said("scale", said, "cannot tell", experiment=experiment, numbers=numbers)
        else:
            about = "about " * (self.case.dtype in ("bfloat16", "float16") and self.scale != self.case.scale)
            what = f"{about}{self.scale:g}"
            self._said("scale", what, experiment=experiment, fields={"scale": self.scale}, numbers=numbers)
        if finding.fields:
            found = self._said_case()
            self.score = lambda logits_nE: self._scores(found, logits_nE)

    def _epsilon(self) -> None:
        function = self.fields.get("score_function")
        if not self.fields.get("renormalize") or function not in ("sigmoid", "sqrt_softplus"):
            return
        weights = self._weights("readout", "offset")
        if weights is None:
            return
        case = self._said_case(renormalize=False)
        sums = self._scores(case, self.probes.logits("offset")).sum(1)
        share = weights.sum(1) / self.scale
        experiment = "logits down to -86: where the weights no longer add up to the scale"
        between = (share > 0.1) & (share < 0.9)
        if between.any():
            fitted = float(np.median(sums[between] * (1 / share[between] - 1)))
            nice = 10.0 ** round(math.log10(fitted))
            near = abs(fitted / nice - 1) < 0.25
            epsilon = nice if near else float(f"{fitted:.2g}")
            self._said(
                "added to the sum",
                f"{epsilon:g}",
                experiment=experiment,
                fields={"epsilon": epsilon},
                numbers={"fitted": fitted},
            )
            return
        smallest = float(sums[share > 0.9].min(initial=math.inf))
        if share.min() > 0.9:
            said = f"nothing, or less than {smallest * 0.1:.0e}"
            kept = self.case.epsilon if self.case.epsilon < smallest * 0.1 else 0.0
            self._said("added to the sum", said, experiment=experiment, fields={"epsilon": kept})
            return
        self._said("added to the sum", "unclear: the weights vanish in one step", "unknown", experiment=experiment)

    def _one_choice(self) -> None:
        if self.case.top_k == 1 or "one_choice-0" not in self.answers:
            return
        experiment = "the same with one expert a token"
        table = self._weights("one_choice", "routing")
        if table is None:  # of one expert, it may have a case of its own
            table = self._weights("one_choice_other", "routing")
        if table is None:
            self._said(
                "one expert a token", f"not asked: {self.answers['one_choice-0'].why}", "unknown", experiment=experiment
            )
            return
        if self.always > 1:
            self._said(
                "one expert a token",
                f"{self.always} here too: the number is not taken from case.top_k",
                "odd",
                experiment=experiment,
            )
            return
        if self.score is None:
            return
        logits = self.probes.logits("routing")
        case = self._said_case(top_k=1)
        hypotheses = [
            Hypothesis(
                words,
                residual(table, self.scale * self._scores(replace(case, renormalize=renormalize), logits)),
                odd=odd,
            )
            for words, renormalize, odd in (
                ("its score, renormalised: 1", True, not self.fields.get("renormalize", False)),
                ("its score, not renormalised", False, bool(self.fields.get("renormalize", False))),
            )
        ]
        if case.score_function == "softmax_of_chosen":
            softmax = replace(case, score_function="softmax", renormalize=False)
            hypotheses[0] = replace(hypotheses[0], odd=False)
            hypotheses[1] = Hypothesis(
                "its score of a softmax over all experts",
                residual(table, self.scale * self._scores(softmax, logits)),
                odd=True,
            )
        self._decide("one expert a token", hypotheses, experiment)

    def _ties(self) -> None:
        if not self.probes.tokens.whole:
            return
        weights = self._weights("readout", "ties")
        if weights is None:
            return
        E, K = self.case.experts, self.case.top_k
        chosen = [np.flatnonzero(row).tolist() for row in weights]
        experiment = "equal logits"
        lower = np.arange(K)[self.kept_K].tolist()
        higher = sorted(np.arange(E)[::-1][:K][self.kept_K].tolist())
        every = sorted({g for ids in chosen for g in ids})  # if the layer drops rows, some experts may be missing
        if every and set(every) <= set(lower):
            self._said("of equal scores", "the lower expert id is chosen", experiment=experiment)
        elif every and set(every) <= set(higher):
            self._said("of equal scores", "the higher expert id is chosen", "odd", experiment=experiment)
        elif not every:
            self._said("of equal scores", "cannot tell: no expert shows", "cannot tell", experiment=experiment)
        else:
            self._said(
                "of equal scores",
                f"neither the lower nor the higher ids are chosen, but {chosen[0]} of {E} equal experts",
                "odd",
                experiment=experiment,
            )

    def _router_precision(self) -> None:
        if not self.probes.tokens.whole or self.case.experts < self.case.top_k + 1:
            return
        above, below = self._weights("readout", "fine above"), self._weights("readout", "fine below")
        if above is None or below is None:
            return
        enough = [((a != 0).sum(1) == self.case.top_k).all() for a in (above, below)]
        if not all(enough):
            said = "cannot tell: not all experts of these tokens show, as where some are dropped"
            self._said("precision of logits", said, "cannot tell", experiment="two logits near each other")
            return
        told = (above[:, 1] != 0) & (above[:, 0] == 0) & (below[:, 0] != 0) & (below[:, 1] == 0)
        experiment = "two logits at -8, one of them 2^-n away"
        if not told.any():
            self._said(
                "precision of logits",
                "unclear: two logits near each other are never told apart",
                "unknown",
                experiment=experiment,
            )
            return
        bits = 4 + max(n for n, yes in zip(BITS, told, strict=True) if yes)
        self._said_bits("precision of logits", bits, experiment)

    def _said_bits(self, key: str, bits: int, experiment: str) -> None:
        dtype = self.case.dtype
        is_router = key == "precision of logits"
        few = {8: "bfloat16", 9: "bfloat16", 11: "float16 or TF32", 12: "float16 or TF32"}
        name = few.get(bits, f"{bits} bits")
        if bits >= (22 if is_router else BITS_OF_FLOAT32):
            name = "float64" if bits > 25 else "float32"
        fields: dict[str, Any] = {}
        odd = False
        if is_router:
            if dtype == "float64":
                fields = {"router_dtype": "float32"} if name == "float32" else {"router_dtype": "wide"}
                odd = name not in ("float32", "float64")
            elif dtype == "float32":
                odd = name != "float32"
            else:
                own = {"bfloat16": "bfloat16", "float16": "float16 or TF32"}[dtype]
                fields = {"router_dtype": "activations" if name == own else "wide"}
                odd = name not in (own, "float32")
        else:
            odd = name not in (dtype, {"float16": "float16 or TF32"}.get(dtype))
        self._said(
            key,
            name,
            "odd" if odd else "found",
            experiment=experiment,
            fields={} if odd else fields,
            numbers={"bits": bits},
        )

    def _rounded(self) -> None:
        """Widen the tolerance if the layer computes in fewer bits than its tokens have."""
        bits = self._bits_of_experts()
        if self.case.dtype == "float32" and bits and bits < BITS_OF_FLOAT32:
            self.tolerance = tolerance("float16" if bits > 9 else "bfloat16")

    def _bits_of_experts(self) -> int:
        """Number of bits in an expert's output; 0 if not asked or not visible."""
        table = self._table("readout", "precision") if self.case.dtype in ("float32", "float64") else None
        if table is None:
            return 0
        total = table.sum(1)
        last = total[-1] if self.case.dtype == "float32" else math.nan
        return max((n + 1 for n, value in zip(BITS, total, strict=True) if value not in (last, 0)), default=0)

    def _expert_precision(self) -> None:
        bits = self._bits_of_experts()
        if bits and not self.on_input:
            self._said_bits("precision of experts", bits, "up = 1 + 2^-n")

    def _combine(self) -> None:
        out, weights = self._out("combine"), self._weights("readout", "routing")
        if out is None or weights is None or self.score is None or self.on_input or self.layout.odd:
            return
        at = self.probes.tokens.at["routing"]
        logits = self.probes.logits("routing")
        rows, ids = self._ids(weights != 0, logits)
        got = out[at][rows]
        narrow = self.case.dtype in ("bfloat16", "float16")
        accum_dtype = np.dtype(self.case.accum_dtype)
        if narrow:
            s_nK = (self._of(self._said_case(), logits[rows], ids) * self.kept_K * self.scale).astype(accum_dtype)
        else:
            s_nK = np.take_along_axis(weights[rows], ids, 1).astype(accum_dtype)
        value = self._narrow(np.array(self.usual()))
        own = self._narrow(value * self._narrow(self.probes.combined_ED))
        y_nKD = own[self.numbers_E[ids]].astype(accum_dtype)
        exact = math.frexp(self.usual())[0] == 0.5
        sums = _Sums(numpy_dtype(self.case.dtype), accum_dtype, self.case.experts // self.case.ranks, ids)
        hypotheses, cast = [], {False: 1.0, True: 1.0}
        for rounded in (False, True) if narrow else (False,):
            # Use the scores as read, if nothing else is rounded: they may have been computed in few bits.
            read = np.take_along_axis(weights[rows], ids, 1) if exact else self._narrow(s_nK)
            s = read.astype(accum_dtype) if rounded else s_nK
            for what, total, odd in sums.each(s, y_nKD):
                off = float((total.astype(np.float64) != got).mean())
                hypotheses.append(Hypothesis(what, off, {}, odd))
                cast[rounded] = min(cast[rounded], off)
        experiment = f"{got.size} sums, bit for bit; residual: part of them that differs"
        if narrow or exact:
            # If one order of summation is right in every bit, a few differing bits exclude the others.
            few = 1e-9 if min(one.residual for one in hypotheses) == 0 else 0.01
            self._decide("sum over the chosen", hypotheses, experiment, few)
        else:
            self._said(
                "sum over the chosen",
                "cannot tell: behind a clamp, scores cannot be read bit for bit",
                "cannot tell",
                experiment=experiment,
            )
        if narrow:
            self._score_dtype(cast, experiment)

    def _score_dtype(self, cast: dict[bool, float], experiment: str) -> None:
        """Whether scores are rounded before they multiply anything, or only their product, before or after w_down.

        Sums of expert outputs tell this where hidden units are powers of two, so that both sides of w_down agree;
        hidden units themselves tell it where they are not.
        """
        accum_dtype, dtype = self.case.score_dtype, self.case.dtype
        off = self._rounded_scores()
        if min(off.values()) > 0.05:
            off = {True: 0.0, False: 0.0}  # the formula does not reproduce hidden units bit for bit
        words = (
            (accum_dtype, max(cast[False], off[False]), False),
            (f"{accum_dtype}, and rounded with the hidden units that they weigh", max(cast[True], off[False]), False),
            (f"{dtype}: rounded before they weigh anything", max(cast[True], off[True]), True),
        )
        hypotheses = [Hypothesis(what, residual, {"cast_scores": narrow}) for what, residual, narrow in words]
        self._decide("dtype of scores", hypotheses, f"{experiment}; and hidden units of several sizes", 0.02)

    def _rounded_scores(self) -> dict[bool, float]:
        """Share of weighted hidden units that rounded scores, and scores that are not rounded, fail to explain."""
        ups = self._narrow(np.array([1 + 2.0**-b for b in BITS]))
        made = {"gate scan": self._value(BOTH, 1.0 if self.case.gated else BOTH), "precision": self._value(V0, ups)}
        wrong, total = {True: 0, False: 0}, 0
        for name, h_n in made.items():
            table = self._table("readout", name)
            if table is None or self.score is None:
                continue
            h_n1 = self._narrow(h_n)[:, None]
            s_nE = self.scale * self.score(self.probes.logits(name))
            size = np.abs(h_n1[:, 0])
            power = np.frexp(size)[0] == 0.5
            # All these tokens have the same scores, which are read where they multiply a power of two.
            read = self._narrow(s_nE)
            if power.any():
                first = int(np.argmax(power & (size > 1e-3)))
                read = np.broadcast_to(table[first] / h_n1[first], table.shape)
            on = (s_nE != 0) & (np.isfinite(size) & ~power & (size > 1e-3))[:, None]
            total += int(on.sum())
            for narrow, s in ((True, read), (False, s_nE)):
                expected = self._narrow((s * h_n1).astype(np.float32))
                wrong[narrow] += int((expected != table)[on].sum())
        return {narrow: n / max(total, 1) for narrow, n in wrong.items()}

    def _parameters(self, name: str) -> Parameters:
        return parameters_in_float64(self.probes.problems[f"{name}-0"].parameters)

    def _asked_for(self, name: str) -> Array | None:
        """Weights of the routing tokens when this parameter is not neutral; None if the layer does not take it."""
        there = any(one.name == name for one in parameters_of(self.case))
        return self._weights(name, "routing") if there and self.score is not None else None

    def _router_bias(self) -> None:
        got = self._asked_for("router_bias")
        if got is None:
            return
        logits, case, bias = (
            self.probes.logits("routing"),
            self._said_case(),
            self._parameters("router_bias").router_bias,
        )
        ordered = -np.sort(-(logits + bias), 1)
        if case.top_k < case.experts:  # another experiment asks which of equal sums is chosen
            told = ordered[:, case.top_k - 1] > ordered[:, case.top_k]
            got, logits = got[told], logits[told]
        biased, plain = self._scores(case, logits + bias), self._scores(case, logits)
        chosen = np.argsort(-(logits + bias), 1, kind="stable")[:, : case.top_k]
        self._decide(
            "router bias",
            [
                Hypothesis("added to the logits", residual(got, self.scale * biased), {"router_bias": True}),
                Hypothesis("ignored", residual(got, self.scale * plain), odd=True),
                Hypothesis(
                    "for the choice only",
                    residual(got, self.scale * self._put(self._of(case, logits, chosen), chosen)),
                    odd=True,
                ),
            ],
            "a bias for each expert",
        )

    def _selection_bias(self) -> None:
        got = self._asked_for("selection_bias")
        if got is None:
            return
        said = self.fields.get("score_function"), self.fields.get("renormalize")
        forms: list[dict[str, Any]] = [{}]
        if said in SAME_SOFTMAX:
            forms = [{"score_function": function, "renormalize": renormalize} for function, renormalize in SAME_SOFTMAX]
        outside: list[dict[str, Any]] = [{}]
        if self.fields.get("groups", 1) > 1:  # a score and its bias may be below zero
            outside = [{"outside_groups": where} for where in ("minus_inf", "zero")]
        hypotheses = list(self._selection_biases(got, self._said_case()))
        for form, where in product(forms, outside):
            others = list(self._selection_biases(got, self._said_case(**form, **where)))
            if hypotheses[0].residual > self.tolerance >= others[0].residual:
                hypotheses = others
                self.fields |= form | where
                for key, fields in (("scores", form), ("choice", where)):
                    next(finding for finding in self.findings if finding.key == key).fields |= fields
        self._decide("selection bias", hypotheses, "a bias for each expert")

    def _selection_biases(self, got: Array, case: Case) -> Iterable[Hypothesis]:
        """Explanations of what a selection bias does to the scores of a case."""
        logits, bias = self.probes.logits("routing"), self._parameters("selection_bias").selection_bias
        none, only = Parameters(np.zeros(0)), Parameters(np.zeros(0), selection_bias=bias)
        at = replace(case, ranks=1, tokens=len(logits))
        score = reference.scores(at, logits[None], Exact())
        largest = -np.sort(-np.pad(score[0] + bias, ((0, 0), (0, 1)), constant_values=-np.inf), 1)
        told = largest[:, case.top_k - 1] - largest[:, case.top_k] > self.tolerance  # the choice is clear of rounding
        chosen = vectorised.select(at, score, only)[0]
        weighed = reference.chosen_scores(at, score + bias, chosen[None], none, Exact()).weight[0]
        by_logits = vectorised.select(at, reference.scores(at, (logits + bias)[None], Exact()), none)[0]
        for what, weight, odd in (
            ("added to the scores for the choice only", self._scores(case, logits, only), False),
            ("ignored", self._scores(case, logits), True),
            ("added to the logits", self._scores(case, logits + bias), True),
            ("added to the logits for the choice only", self._put(self._of(case, logits, by_logits), by_logits), True),
            ("added to the scores, and in the weights too", self._put(weighed, chosen), True),
        ):
            # If scores are logits, two of these explanations are the same.
            if case.score_function != "softmax_of_chosen" or "logits" not in what:
                of_case = {} if odd else {"selection_bias": True}
                yield Hypothesis(what, residual(got[told], self.scale * weight[told]), of_case, odd)

    def _expert_scale(self) -> None:
        got = self._asked_for("expert_scale")
        if got is None:
            return
        logits, case, w = self.probes.logits("routing"), self._said_case(), self._parameters("expert_scale")
        plain = self._scores(case, logits)
        before = plain * w.expert_scale
        self._decide(
            "scale of experts",
            [
                Hypothesis("multiplies the weights", residual(got, self.scale * before), {"expert_scale": True}),
                Hypothesis("ignored", residual(got, self.scale * plain), odd=True),
                Hypothesis(
                    "multiplies the scores before they are renormalised",
                    residual(got, self.scale * before / before.sum(1, keepdims=True)),
                    odd=True,
                ),
            ],
            "a scale for each expert",
        )

    def _expert_bias(self) -> None:
        if not self.case.expert_bias or self.on_input or self.layout.odd:
            return
        small = np.abs(BOTH) <= 8
        tables = [
            self._table("expert_bias", "gate scan"),
            self._table("expert_bias", "up scan"),
            self._table("readout", "reference"),
        ]
        if any(table is None for table in tables):
            return
        gate_scan, up_scan, usual = (table.sum(1) for table in tables if table is not None)
        size = usual[0] / float(self._value(2.0, 1.0)[0])
        if size == 0:
            return
        got = np.concatenate([gate_scan[small], up_scan[small]]) / size
        b_gate, b_up = -0.5, 0.25
        hypotheses = []
        for what, bias, odd in (
            ("added to gate and up", (b_gate, b_up), False),
            ("ignored", (0.0, 0.0), True),
            ("of up ignored", (b_gate, 0.0), True),
            ("of the gate ignored", (0.0, b_up), True),
            ("of gate and up exchanged", (b_up, b_gate), True),
        ):
            if not self.case.gated and what not in ("added to gate and up", "ignored"):
                continue
            first = self._value(BOTH[small], 1.0 if self.case.gated else BOTH[small], bias)
            second = self._value(2.0, BOTH[small], bias)
            off = residual(got, np.concatenate([first, second]), 1e-2)
            hypotheses.append(Hypothesis(what, off, {} if odd else {"expert_bias": True}, odd))
        self._decide("biases of gate and up", hypotheses, "biases of -0.5 and 0.25")

    def _b_down(self) -> None:
        if not self.case.expert_bias or self.on_input:
            return
        out, weights = self._out("b_down"), self._weights("readout", "routing")
        if out is None or weights is None:
            return
        got = out[self.probes.tokens.at["routing"]]
        b = self.probes.learned["b_down"][self.numbers_E]
        of_ranks = b.reshape(self.case.ranks, -1, self.case.width)
        e = of_ranks.shape[1]
        others = {"next": np.roll(of_ranks, -1, 1).reshape(b.shape)} if e > 1 else {}
        others |= {"previous": np.roll(of_ranks, 1, 1).reshape(b.shape)} if e > 2 else {}
        self._decide(
            "bias of down",
            [
                Hypothesis(
                    "added to what an expert returns, and weighed", residual(got, weights @ b), {"expert_bias": True}
                ),
                Hypothesis("added and not weighed", residual(got, (weights != 0) @ b), odd=True),
                *(
                    Hypothesis(f"added, of the {which} expert of the rank", residual(got, weights @ other), odd=True)
                    for which, other in others.items()
                ),
                Hypothesis("ignored", _off(got, np.zeros_like(got)), odd=True),
            ],
            "w_down = 0, and a bias for each expert",
        )

    def _shared(self) -> None:
        out = self._out("shared") if self.case.shared_hidden else None
        if out is None:
            return
        at = self.probes.tokens.at["routing"]
        got_nD, x_nD = out[at], self.probes.x_nD[at].astype(np.float64)
        made_n1 = self._value(x_nD[:, V] / V0, 1.0)[:, None]
        score_n1 = SHARED_SCORE * x_nD[:, [FEATURES]] if self.case.shared_score else None
        once_n1 = made_n1 if score_n1 is None else reference.sigmoid(score_n1) * made_n1
        weighed = ", weighed by the sigmoid of its score" * self.case.shared_score
        ways = {f"added{weighed}": once_n1, "ignored": 0 * once_n1}
        if self.scale != 1:
            ways[f"added{weighed}, times the scale"] = self.scale * once_n1
        factor = times(got_nD, once_n1 * np.ones_like(got_nD))
        if min(abs(factor - other) for other in (0, 1, self.scale)) > self.tolerance:
            each = {self.case.top_k: ": once for each choice", self.case.ranks: ": once for each rank"}
            often = _nice(factor, self.case.top_k, self.tolerance)
            why = each.get(int(often), "") if often == int(often) else ""
            ways[f"added{weighed}, {often:g} times{why}"] = often * once_n1
        if score_n1 is not None:
            ways["added; its score ignored"] = made_n1
            ways["added, weighed by its score without a sigmoid"] = score_n1 * made_n1
        known = {"shared_hidden": self.case.shared_hidden, "shared_score": self.case.shared_score}
        right = f"added{weighed}"
        hypotheses = [
            Hypothesis(what, _off(got_nD, a_n1), known if what == right else {}, what != right)
            for what, a_n1 in ways.items()
        ]
        self._decide("shared expert", hypotheses, "w_down of all others = 0")
        self._clamp_of_shared(1.0 if score_n1 is None else 0.5)  # of no logit

    def _clamp_of_shared(self, score: float) -> None:
        out = self._out("shared_wide") if self.clamp != FREE else None
        if out is None:
            return
        got = out[self.probes.tokens.at["gate scan"]][:, 0]
        clamped, clamp = self._value(BOTH, 1.0), self.clamp
        self.clamp = FREE
        free = self._value(BOTH, 1.0)
        self.clamp = clamp
        self._decide(
            "clamp of the shared expert",
            [
                Hypothesis("as that of the others", residual(got, score * clamped)),
                Hypothesis("none", residual(got, score * free), odd=True),
            ],
            f"its gate from -{SCAN[-1]:g} to {SCAN[-1]:g}",
            2 * self.tolerance,
        )

    def _company(self) -> None:
        answer, alone = self._out("company"), self._out("expert_bias-0" if self.case.expert_bias else "readout-0")
        if answer is None or alone is None:
            return
        shape = (self.case.ranks, self.case.tokens, self.case.width)
        here, there = answer.reshape(shape)[:, ::2], alone.reshape(shape)[:, ::2]
        changed = int((here != there).any(-1).sum())
        off = residual(here, there)
        experiment = "every other token changed"
        if not changed:
            self._said("other tokens", "change nothing, bit for bit", experiment=experiment)
        elif off <= self.tolerance:
            self._said("other tokens", "change nothing but roundings", residual=off, experiment=experiment)
        else:
            tokens = here.shape[0] * here.shape[1]
            self._said(
                "other tokens",
                f"change the output of {changed} of {tokens} tokens, by {off:.0%} at most",
                "odd",
                residual=off,
                experiment=experiment,
            )

    def _no_cotangent(self) -> None:
        answer = self.answers["no-cotangent"]
        if answer.trace is None:
            return
        names = [name for name in OUTSIDE[1:] if name in answer.trace.arrays]
        some = [
            name.rpartition("/")[2]
            for name in names
            if any(a.astype(np.float64).any() for a in answer.trace.arrays[name])
        ]
        experiment = "a cotangent of zero"
        if some:
            self._said(
                "gradient at cotangent 0",
                f"not zero: {', '.join(some)}: an auxiliary loss",
                "odd",
                experiment=experiment,
            )
        else:
            self._said("gradient at cotangent 0", "zero: no auxiliary loss", experiment=experiment)


class _Sums(NamedTuple):
    """The ways to sum the outputs of the chosen experts."""

    dtype: np.dtype
    accum_dtype: np.dtype
    per_rank: int
    ids_nK: Array

    def each(self, s_nK: Array, y_nKD: Array) -> Iterable[tuple[str, Array, bool]]:
        """Each way: its words, the sum in the case's dtype, and whether it differs from this project's way."""
        n, K = self.ids_nK.shape
        by_k = np.tile(np.arange(K), (n, 1))
        by_id = np.argsort(self.ids_nK, 1, kind="stable")
        orders = {
            "in order of k": by_k,
            "from the last of k": by_k[:, ::-1],
            "in order of expert": by_id,
            "from the last expert": by_id[:, ::-1],
        }
        for words, order in orders.items():
            s, y = np.take_along_axis(s_nK, order, 1), np.take_along_axis(y_nKD, order[..., None], 1)
            for how, total in self._ways(s, y):
                if K > 2 or how.endswith(("not rounded", f"of products in {self.accum_dtype}")):
                    yield f"{words}, {how}", total.astype(self.dtype), False
                elif order is by_k:  # order does not change a sum of two that are rounded alike
                    yield how, total.astype(self.dtype), False
        if K > 2 and (self.ids_nK // self.per_rank).any():
            yield from self._by_rank(s_nK, y_nKD, {"in order of k": by_k, "in order of expert": by_id})

    def _by_rank(self, s_nK: Array, y_nKD: Array, orders: Mapping[str, Array]) -> Iterable[tuple[str, Array, bool]]:
        """Each rank sums the outputs of its own experts, and then these sums are added."""
        accum_dtype, dtype = self.accum_dtype, self.dtype
        part_nK = self.ids_nK // self.per_rank
        ranks = int(part_nK.max(initial=0)) + 1
        for words, order in orders.items():
            part, s = (np.take_along_axis(a, order, 1) for a in (part_nK, s_nK))
            y = np.take_along_axis(y_nKD, order[..., None], 1)
            for ways in zip(*(self._ways(np.where(part == rank, s, 0), y) for rank in range(ranks)), strict=True):
                each = f"each {words}, {ways[0][0]}"
                for rounded, outer in dict.fromkeys([(accum_dtype, accum_dtype), (dtype, accum_dtype), (dtype, dtype)]):
                    if ranks == 2 and outer != accum_dtype:
                        continue  # the order of two sums makes no difference
                    sums = [own.astype(rounded).astype(accum_dtype) for _, own in ways]
                    total = np.zeros_like(sums[0])
                    for own in sums:
                        total = (total + own).astype(outer).astype(accum_dtype)
                    narrowed = rounded != accum_dtype and ways[0][1].dtype != rounded
                    how = each + f", rounded to {rounded}" * narrowed
                    yield f"ranks one after the other, in {outer}; {how}", total.astype(dtype), False

    def _ways(self, s: Array, y: Array) -> Iterable[tuple[str, Array]]:
        accum_dtype, dtype = self.accum_dtype, self.dtype
        start = np.zeros(y[:, 0].shape, accum_dtype)
        rounded, fused = start, start
        for k in range(s.shape[1]):
            rounded = rounded + s[:, k, None] * y[:, k]
            fused = (fused.astype(np.longdouble) + s[:, k, None].astype(np.longdouble) * y[:, k]).astype(accum_dtype)
        yield f"in {accum_dtype}", rounded
        yield f"in {accum_dtype}, products not rounded", fused
        if dtype == accum_dtype:
            return
        products = (s[..., None] * y).astype(dtype)
        total, narrow, mixed = start, start.astype(dtype), start.astype(dtype)
        for k in range(s.shape[1]):
            total = total + products[:, k].astype(accum_dtype)
            narrow = (narrow.astype(accum_dtype) + products[:, k].astype(accum_dtype)).astype(dtype)
            mixed = (mixed.astype(accum_dtype) + s[:, k, None] * y[:, k]).astype(dtype)
        yield f"in {accum_dtype}, of products in {dtype}", total
        yield f"in {dtype}", narrow
        yield f"in {dtype}, of products in {accum_dtype}", mixed


def _off(got: Array, expected: Array) -> float:
    """The residual; infinite if zero is expected and something is there."""
    if not expected.any():
        return math.inf if got.any() else 0.0
    return residual(got, expected)


def _nice(value: float, asked: float | None, tolerance: float) -> float:
    """The intended number: the asked case's, 0 or 1 if near; otherwise rounded to the digits that are known."""
    for wanted in (asked, 0.0, 1.0):
        if wanted is not None and abs(value - wanted) <= tolerance * max(abs(wanted), 1.0):
            return float(wanted)
    digits = max(2, int(-math.log10(max(tolerance, 1e-12))))
    return float(f"{value:.{digits}g}")


def _meant(value: float, asked: float | None, tolerance: float) -> float:
    """The asked case's number if it is within the tolerance; otherwise the number of fewest digits that is."""
    near = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next(one for one in (asked, *near, value) if one is not None and abs(value - one) <= tolerance * abs(value))


def _inverse(f: Function, value: float) -> float:
    """Where a function, rising above zero, has this value; infinity if not before the end of the scan."""
    low, high = 0.0, 2 * SCAN[-1]
    if value >= float(f(np.array(high))):
        return math.inf
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(f(np.array(middle))) < value else (low, middle)
    return low

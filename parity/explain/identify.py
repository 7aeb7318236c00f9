"""Make the card of a backend: ask it, read its answers, and prove the case that was found."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.cases.case import Case
from parity.cases.parameters import BY_NAME
from parity.cases.presets import MODELS, PRESETS, command
from parity.explain import capacity, probes
from parity.explain.ask import Answer, ask
from parity.explain.hypotheses import Hypothesis, decide, residual, times, tolerance
from parity.explain.reading import Reading
from parity.judge.card import NOT_RUN, Card, Finding
from parity.judge.compare import Check
from parity.judge.engine import judge
from parity.judge.records import Report
from parity.oracle import reference
from parity.oracle.problem import Problem, draw, exact_inputs
from parity.oracle.quantities import OUTSIDE
from parity.oracle.reference import Exact
from parity.oracle.vectorised import oracle_for
from parity.run.backend import Backend, BackendError, Setting
from parity.run.supervisor import Kept

# Findings that do not apply to a layer that takes these as inputs; the first key of each stands for all.
GIVEN = {
    "expert_id": ("choice", "experts of a token", "of equal scores", "precision of logits"),
    "score": (
        "scores", "scale", "added to the sum", "one expert a token", "dtype of scores", "router bias",
        "selection bias", "scale of experts",
    ),
}  # fmt: skip

# Findings that tell whether a layer uses a parameter that it takes, and the case field of the parameter.
UNUSED = {
    "router bias": "router_bias",
    "selection bias": "selection_bias",
    "scale of experts": "expert_scale",
    "bias of down": "expert_bias",
}


def identify(
    backend: Backend,
    bases: Sequence[Case],
    setting: Setting,
    home: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Card:
    """What the backend's layer is, asked in the sizes and with the options of the first of `bases` that it computes.

    `tell` is called with each step in words; `home` is the folder to run from.

    Raises BackendError if the layer computes none of them, or does not run.
    """
    with Kept(backend, setting, home or Path.cwd()) as kept:
        return card_of(kept, bases, tell)


def card_of(kept: Kept, bases: Sequence[Case], tell: Callable[[str], None] = lambda _: None) -> Card:
    """The card of a backend whose processes are kept running; arguments as in `identify`."""
    begin, backend = time.perf_counter(), kept.backend
    tell(f"{backend.name}: running the probes")
    base = _computed(kept, bases)
    found, answers = _asked(kept, base)
    reading = Reading(found, answers)
    findings = _of_its_own(backend, reading.all())
    if reading.always not in (0, base.top_k):
        top_k = Finding(
            "experts of a token", f"{reading.always}, whatever case.top_k is", fields={"top_k": reading.always},
            experiment=f"random logits, {base.top_k} and 1 asked for",
        )  # fmt: skip
        found, answers = _asked(kept, replace(base, top_k=reading.always))
        reading = Reading(found, answers)
        findings = [top_k if f.key == top_k.key else f for f in _of_its_own(backend, reading.all())]
    findings += capacity.read(reading, answers, base.capacity_factor)
    tell(f"{backend.name}: checking what was found")
    case = _found(base, found.case, reading)
    proof, proved, more = _proved(kept, case)
    findings += more
    case = _as_drawn(kept, base, case) if proved else case
    again = f"{command(case)} {backend.flag}"
    return Card(backend.name, base, findings, case, proof, proved, again, time.perf_counter() - begin)


def _computed(kept: Kept, cases: Sequence[Case]) -> Case:
    """The first of these cases that the backend computes."""
    if len(cases) == 1:
        return cases[0]
    why = []
    for case in cases:  # one at a time, as JAX compiles each
        answer = ask(kept, {"a small one": draw(replace(case, tokens=4))})["a small one"]
        if answer.trace is not None:
            return case
        why.append(answer.why)
    name = kept.backend.name
    reasons = [*dict.fromkeys(why)]
    said = "; ".join(reasons[:2]) + f"; and {len(reasons) - 2} other reasons" * (len(reasons) > 3)
    raise BackendError(name, f"{name} computes none of {len(cases)} cases ({said}): give the flags of one that it does")


def _of_its_own(backend: Backend, findings: list[Finding]) -> list[Finding]:
    """Replace findings on scores and choice that are given to the layer by a note that they are given."""
    given = {key: keys[0] for name, keys in GIVEN.items() if name in backend.takes for key in keys}
    own = [finding for finding in findings if given.get(finding.key, finding.key) == finding.key]
    said = "given to the layer"
    return [Finding(f.key, said, experiment="what it takes") if f.key in given else f for f in own]


def small_cases() -> list[Case]:
    """The cases in which a layer is asked by default: without options, and with those of each model."""
    plain = Case(name="small")
    models = [
        replace(case, ranks=1, width=48, hidden=24, tokens=16, experts=16)
        for case in MODELS.values()
        if case.top_k <= 8
    ]
    models = [replace(case, shared_hidden=24 if case.shared_hidden else 0) for case in models]
    ungated = replace(PRESETS["like-nemotron-h"], ranks=1)
    lfm2 = replace(
        plain, ranks=1, name="like-lfm2", score_function="sigmoid", renormalize=True, epsilon=1e-6,
        router_dtype="activations", cast_scores=True,
    )  # fmt: skip
    of_one = replace(plain, ranks=1, name="of-one", top_k=1)
    two = [plain, replace(plain, name="renormalised", renormalize=True)]
    every = (*two, *(replace(case, ranks=1) for case in two), *models, ungated, lfm2, of_one)
    return [replace(case, name=f"{case.name}-{case.ranks}") for case in every]


def explain_failures(
    report: Report, backends: Sequence[Backend], setting: Setting, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Add to the report the card of each layer that fails and gives no stages, asked in the first case it fails.

    A case in which it raised, or is right by the oracle and wrong by others, is not asked about.
    """
    verdicts = {name: report.verdicts(name) for name in report.cases}
    for backend in backends:
        if backend.layout != "opaque":
            continue
        failing = [
            name
            for name, found in verdicts.items()
            if any(backend.name in one.backends and not one.check.raised for one in found)
            and report.cases[name].beside.get(backend.name, True)
        ]
        asked = {name: report.cases[name].case for name in failing}
        able = [name for name, case in asked.items() if not case.real_size and case.width >= probes.FEATURES + 2]
        for name in able[:1]:
            case = asked[name]
            tell(f"{backend.name}: looking for the cause")
            with suppress(BackendError, ValueError):
                report.cards.setdefault(name, []).append(identify(backend, [case], setting))


def _asked(kept: Kept, base: Case) -> tuple[probes.Probes, dict[str, Answer]]:
    """Probes and answers, with all inputs that the layer takes or, if it fails on those, with the ones it computes."""
    backend, why = kept.backend, ""
    for takes in (backend.takes, _computed_alone):
        found = probes.make(
            probes.probing_case(base, takes(kept, base) if callable(takes) else takes),
            evaluated=backend.layout != "opaque",
        )
        if "keep" not in backend.takes and backend.layout == "opaque":
            found.problems.update(capacity.problems(found, base.capacity_factor))
        answers = ask(kept, found.problems)
        if answers["readout-0"].trace is not None:
            return found, answers
        why = answers["readout-0"].why
    raise BackendError(backend.name, f"{backend.name} does not compute the case that it is asked in: {why}")


def _computed_alone(kept: Kept, base: Case) -> tuple[str, ...]:
    """The optional inputs that a layer takes and really computes with; each is asked for on its own."""
    takes = kept.backend.takes
    plain = tuple(name for name in takes if name not in BY_NAME or BY_NAME[name].there(replace(base, **TAKES_NO_MORE)))
    more = {what: (*plain, *names) for what, names in TOGETHER.items() if set(names) & {*takes}}
    asked = {
        what: replace(probes.probing_case(base, names), name=f"alone-{what}", tokens=4) for what, names in more.items()
    }
    answers = ask(kept, {what: draw(case) for what, case in asked.items()})
    computed = [name for what in more if answers[what].trace is not None for name in TOGETHER[what]]
    return (*plain, *dict.fromkeys(computed))


# Optional inputs of a case, each with the parameters that come together with it.
TOGETHER = {
    "router_bias": ("router_bias",), "selection_bias": ("selection_bias",), "expert_scale": ("expert_scale",),
    "expert_bias": ("b_gate", "b_up", "b_down"), "shared_expert": ("shared_w_gate", "shared_w_up", "shared_w_down"),
    "shared_score": ("shared_w_gate", "shared_w_up", "shared_w_down", "shared_score"),
}  # fmt: skip
TAKES_NO_MORE: dict[str, Any] = {
    "router_bias": False, "selection_bias": False, "expert_scale": False, "expert_bias": False, "shared_hidden": 0,
    "shared_score": False,
}  # fmt: skip


def _found(base: Case, asked: Case, reading: Reading) -> Case:
    """The case that expresses what was found."""
    unused = {
        UNUSED[finding.key]: False
        for finding in reading.findings
        if finding.key in UNUSED and finding.what.startswith("ignored")
    }
    stem = base.name.removesuffix("-changed")
    name = f"{stem}-changed" if stem in PRESETS or stem in MODELS else Case().name
    own = {"name": name, "capacity_factor": base.capacity_factor}
    if reading.fields.get("score_on") == "input":
        unused["expert_bias"] = False  # no case has both
    return replace(asked, tokens=base.tokens, seed=base.seed, **(own | reading.fields | unused))


def _as_drawn(kept: Kept, base: Case, found: Case) -> Case:
    """The found case with the asked one's routing and tokens, if the layer matches there too; else as it is."""
    with suppress(ValueError):
        case = replace(found, **{name: getattr(base, name) for name in probes.DRAWN})
        if case != found and _proved(kept, case)[1]:
            return case
    return found


def _proved(kept: Kept, case: Case) -> tuple[str, bool, list[Finding]]:
    """The verdict of `check` on the found case, and findings on gradients that do not match."""
    problem = draw(case)
    given = problem if "keep" in kept.backend.takes else replace(problem, keep=np.ones_like(problem.keep))
    answer = ask(kept, {"proof": given})["proof"]
    if answer.trace is None:
        return f"{NOT_RUN}{answer.why}", False, []
    _, checks = judge(problem, [answer.trace])
    bad = [check for check in checks if not check.ok]
    gradients = [name for name in OUTSIDE[1:] if name in answer.trace.arrays]
    largest = max((check.worst for check in checks if not check.bitwise), default=0.0)
    if not bad:
        said = f"output and {len(gradients)} gradients match, at most {largest:.2f} of their allowance"
        derivative = Finding(
            "gradients", f"the derivative of the output, all {len(gradients)}", experiment="the found case"
        )
        return said, True, [derivative]
    if any(check.value == "out" for check in bad):
        worst = max((check for check in bad if check.value == "out"), key=lambda check: check.worst)
        return f"the output does not match: {worst.worst:.3g} times its allowance", False, []
    names = sorted({check.value for check in bad})
    return f"the output matches; {', '.join(names)} do not", False, _gradients(problem, answer, bad)


def _gradients(problem: Problem, answer: Answer, bad: list[Check]) -> list[Finding]:
    """Findings on gradients that are not the derivative."""
    case = problem.case
    derivatives = _derivatives(problem)
    wrong = {f"{check.stage}/{check.value}" for check in bad}
    found = []
    for name in [name.removeprefix("e2e/") for name in OUTSIDE[1:]]:
        got = answer.gradient(name)
        if name not in wrong or got is None:
            continue
        want = _as_many(derivatives["the derivative"][name], got)
        hypotheses = [
            Hypothesis(what, residual(got, factor * want, 1e-2) if factor else _size(got, want), odd=True)
            for what, factor in _factors(case).items()
        ]
        for what, of in derivatives.items():
            if name in of and what != "the derivative":
                hypotheses.append(Hypothesis(what, residual(got, _as_many(of[name], got), 1e-2), odd=True))
        close = 100 * tolerance(case.dtype)
        if min(one.residual for one in hypotheses) > close:
            factor = times(got, want)
            hypotheses.append(Hypothesis(f"{factor:.3g} times it", residual(got, factor * want, 1e-2), odd=True))
        finding = decide(f"gradient {name.rpartition('/')[2]}", hypotheses, close, "the found case")
        found.append(finding)
    return found


def _factors(case: Case) -> dict[str, float]:
    """Factors, with their words, that implementations are known to multiply gradients by."""
    P, K, n = case.ranks, case.top_k, case.ranks * case.tokens
    found = {"zero": 0.0, "of the other sign": -1.0}
    if P > 1:
        found |= {f"{P} times too large, once for each rank": P, f"1/{P} of it": 1 / P}
    if K not in (1, P):
        found |= {f"{K} times too large, once for each choice": K}
    return found | {f"1/{case.tokens}: a mean over tokens": 1 / case.tokens, f"1/{n}: a mean over all tokens": 1 / n}


def _as_many(of: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Repeat an array that all ranks share to the shape of `got`, which holds it once per rank."""
    return np.concatenate([of.reshape(-1)] * (got.size // of.size)).reshape(got.shape)


def _size(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got).max(initial=0)) / max(float(np.abs(want).max(initial=0)), 1e-300)


def _derivatives(problem: Problem) -> dict[str, dict[str, np.ndarray]]:
    """Gradients that implementations are known to compute instead of the derivative, by description."""
    case, exact, keep = problem.case, problem.exact, problem.keep
    x, w, dout = exact_inputs(problem)
    derivative = {"route/dx": exact.dx} | {BY_NAME[name].gradient: a for name, a in exact.gradients.items()}
    all_of: dict[str, dict[str, np.ndarray]] = {
        "the derivative": derivative,
        "without what comes through the scores": {"route/dx": exact.dx - exact.dx_router},
        "only what comes through the scores": {"route/dx": exact.dx_router},
    }
    if case.shared_hidden:
        all_of["without what comes through the chosen experts"] = {"route/dx": exact.dx - exact.dx_experts}
    if case.score_on == "output" and case.top_k > 1:
        all_of["without what comes through the last choice"] = {"route/dx": exact.dx - exact.dx_rows[..., -1, :]}
    if case.score_on == "output" and case.top_k > 2:
        all_of["only the first choice's, of what comes through experts"] = {
            "route/dx": exact.dx - exact.dx_experts + exact.dx_rows[..., 0, :]
        }
    if case.score_on == "output":
        for what, score in _other_scores(problem).items():
            dy = np.where(keep, score, 0)[..., None] * dout[..., None, :]
            dx_rows, of_experts = oracle_for(case).experts_backward(case, x, problem.expert_id, w, dy, Exact())
            of = {BY_NAME[name].gradient: a for name, a in of_experts.items()}
            all_of[what] = of | {"route/dx": exact.dx - exact.dx_experts + dx_rows.sum(axis=-2)}
    if case.renormalize:
        plain = replace(case, renormalize=False)
        _, score = oracle_for(case).route(case, x, w, Exact())
        chosen = reference.chosen_scores(case, score, problem.expert_id, w, Exact()).score
        divided = exact.dscore / (chosen.sum(-1, keepdims=True) + case.epsilon)
        dx, of_router = oracle_for(case).route_backward(plain, x, w, problem.expert_id, divided, Exact())
        kept = {BY_NAME[name].gradient: a for name, a in of_router.items()}
        all_of["that of scores whose sum is taken for a constant"] = kept | {
            "route/dx": exact.dx - exact.dx_router + dx
        }
    return all_of


def _other_scores(problem: Problem) -> dict[str, np.ndarray]:
    """Scores [P, T, K] that are known to weight expert gradients instead of each row's own score."""
    case, score = problem.case, problem.exact.score
    unsorted = np.zeros_like(score)
    for rank in range(case.ranks):
        order = np.argsort(problem.expert_id[rank].reshape(-1), kind="stable")
        unsorted[rank].reshape(-1)[order] = score[rank].reshape(-1)
    return {
        "that of experts whose rows no score weighs": np.ones_like(score),
        "that of experts weighed by scores of other rows: scores by token, rows by expert": unsorted,
    }

"""From one published layer to another: what moving weights needs, and what no conversion mends."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

from msgspec.structs import replace

from parity.cases.parameters import BY_NAME
from parity.explain.hypotheses import CANNOT_TELL, OR, tolerance
from parity.judge.card import STAGE, Card, Finding
from parity.oracle.quantities import OUTSIDE
from parity.survey.records import Difference, Surveyed

# What layers that differ in something are to each other: two functions; one, where a parameter of the first is as if it
# were not there; one, except for some inputs; one in its output, and not in training; one, rounded elsewhere.
Level = Literal["function", "some weights", "some inputs", "training", "roundings"]
LEVELS: dict[Level, str] = {
    "function": "Two functions: they differ in {}.",
    "some weights": "One function for some weights of {{a}} only, because of its {}.",
    "some inputs": "One function for most inputs; for some they differ: {}.",
    "training": "One function with other gradients: {}.",
    "roundings": "One function, rounded elsewhere: {}.",
}

# Where a difference shows that is not in every output.
SHOWS: dict[str, tuple[Level, str]] = {
    "of equal scores": ("some inputs", "where two scores are equal, as in 16 bits they often are"),
    "added to the sum": ("some inputs", "where the sum of the chosen scores comes near it"),
    "clamp": ("some inputs", "where a gate or an up is beyond it"),
    "clamp of the shared expert": ("some inputs", "where a gate or an up of the shared expert is beyond it"),
    "one expert a token": ("some inputs", "with one expert a token"),
    "dropped": ("some inputs", "where more tokens want an expert than it takes"),
    "weight of the dropped": ("some inputs", "where tokens are dropped"),
    "other tokens": ("some inputs", "where other tokens are others: what is beside a token changes its output"),
    "finite": ("some inputs", "where the output is no number"),
    "gradient at cotangent 0": ("training", "in training: a loss of its own that gradients have in them"),
    "gradients": ("training", "in training"),
    "precision of logits": (
        "roundings",
        "in roundings, and in the choice between experts whose logits are nearer than these",
    ),
    "precision of experts": ("roundings", "in roundings"),
    "dtype of scores": ("roundings", "in roundings: one of each weight"),
    "sum over the chosen": ("roundings", "in roundings: one or more of each number of the output"),
    "repeatable": ("roundings", "in roundings, from run to run"),
}
EVERYWHERE: tuple[Level, str] = ("function", "in every output")

# What follows from another finding: where that differs, or is none, it is no difference more.
FOLLOWS = {
    "added to the sum": {"scores"},
    "one expert a token": {"scores"},
    "weight of the dropped": {"dropped"},
    "gate and up": {"experts"},
    "added to up": {"experts"},
    "clamp": {"experts"},
    "clamp of the shared expert": {"clamp", "shared expert"},
}

# By the finding of it, what a layer may learn, and the value with which it is as if it were not there.
NEUTRAL = {
    "router bias": (("router_bias",), "zero"),
    "selection bias": (("selection_bias",), "zero"),
    "scale of experts": (("expert_scale",), "one"),
    "biases of gate and up": (("b_gate", "b_up"), "zero"),
    "bias of down": (("b_down",), "zero"),
    "shared expert": (("shared_w_gate", "shared_w_up", "shared_w_down"), "zero"),
}

# What is kept together, or might be.
TOGETHER = (
    ("router",), ("w_gate", "w_up"), ("w_down",), ("router_bias",), ("selection_bias",), ("expert_scale",),
    ("b_gate", "b_up"), ("b_down",), ("shared_w_gate", "shared_w_up"), ("shared_w_down",), ("shared_score",),
)  # fmt: skip
PAIRS = {
    ("w_gate", "w_up"): "gate_up", ("b_gate", "b_up"): "b_gate_up", ("shared_w_gate", "shared_w_up"): "shared_gate_up",
}  # fmt: skip
FUSED = {name: ours for ours, name in PAIRS.items()}
FUSED |= {name.replace("gate_up", "up_gate"): ours[::-1] for name, ours in FUSED.items()}

QUICK = 1.702  # quick_gelu(g) is silu of so many times g, divided by it
BOUND = "nothing, or less than "  # of what is added to the sum
GIVEN = "given to the layer"
ORDER = [name.rpartition("/")[2] for name in OUTSIDE]  # of what is measured
BAR = r"\|"  # in a table of Markdown
UNEXPLAINED = "No finding explains how far apart they are."
ARROW = " \N{RIGHTWARDS ARROW} "


class Need(NamedTuple):
    """Something to do with weights on the way from {a} to {b}."""

    what: str  # in words
    of: tuple[str, ...] = ()  # our names of what it is done to
    code: str = ""  # that does it, by einops, in our names
    idle: bool = False  # nothing but another name
    changes: bool = False  # numbers, and not only where they stand


class Remain(NamedTuple):
    """Something in which {a} and {b} differ, whatever the weights are."""

    key: str
    a: str
    b: str
    level: Level = "function"
    shows: str = ""  # where


class Moving(NamedTuple):
    """The way from one layer to another."""

    needs: list[Need]
    remains: list[Remain]
    unsure: list[Remain]  # what could not be told of one of them, or is not said of both

    @property
    def same(self) -> bool:
        """Whether nothing was found of which the outputs of the two, with the same weights, would differ."""
        return not (self.remains or self.unsure or any(need.changes for need in self.needs))

    @property
    def verdict(self) -> str:
        """In a sentence, what they are to each other."""
        for level, words in LEVELS.items():
            if keys := [one.key for one in self.remains if one.level == level]:
                return words.format(", ".join(keys))
        return "One function: moving weights is all there is to do."


class Kept(NamedTuple):
    """A parameter that a layer keeps."""

    name: str
    ours: tuple[str, ...]  # in the order in which it has them
    axes: str

    @property
    def stacked(self) -> "Kept":
        """With all experts in one array."""
        own = BY_NAME[self.ours[0]].axes.startswith("E") and "E" not in self.axes.split()
        return self._replace(axes=f"E {self.axes}") if own else self

    @property
    def called(self) -> str:
        """What code calls it."""
        fused = {ours: name for name, ours in FUSED.items()}
        return fused.get(self.ours, "_".join(self.ours))


def kept(one: Surveyed) -> tuple[Kept, ...]:
    """What a layer keeps; of parameters that each expert has of its own, one stands for all."""
    return _kept(tuple(one.stored.items()))


@cache
def _kept(stored: tuple[tuple[str, str], ...]) -> tuple[Kept, ...]:
    found = {}
    for name, place in stored:
        ours, _, axes = place.partition(": ")
        parts = FUSED.get(ours) or tuple(ours.split(" and "))
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        found[name, place] = Kept(name, parts, axes.replace("H", "F"))
    return tuple(found.values())


def has(one: Surveyed, ours: str) -> bool:
    """Whether a layer has a parameter of ours."""
    if one.stored:
        return any(ours in its.ours for its in kept(one))
    return one.card is not None and bool(BY_NAME[ours].there(one.card.case))


def moving(a: Surveyed, b: Surveyed) -> Moving:
    """What moving the weights of `a` into `b` needs, and in what the two differ then. Both have a card."""
    assert a.card
    assert b.card
    needs, remains, unsure = [], [], []
    for ours in TOGETHER:
        needs += _arranged(ours, a, b)
    if not a.stored or not b.stored:
        who = " and ".join(f"{{{x}}}" for x, one in (("a", a), ("b", b)) if not one.stored)
        needs.append(Need(f"how weights are kept is not known of {who}: transposes are left out here"))
    mended: set[str] = set()
    for part in (_lacking(a, b), _scaled(a, b), _stretched(a, b), _lifted(a, b)):
        needs += [need._replace(changes=True) for need in part.needs]
        remains += part.remains
        mended |= part.keys
    for one, sure in _differences(a, b, mended):
        if one.key in ("gate and up", "numbers of experts") and sure:
            needs.append(Need(f"{one.key}: {{a}}: {one.a}; {{b}}: {one.b}: bring them into the order of {{b}}"))
        else:
            (remains if sure else unsure).append(one)
    levels, stages = list(LEVELS), list(STAGE)
    remains.sort(key=lambda r: (levels.index(r.level), stages.index(r.key) if r.key in STAGE else len(stages)))
    needs.sort(key=lambda need: need.idle)
    return Moving(needs, remains, unsure)


# ---- Layout


def _arranged(ours: tuple[str, ...], a: Surveyed, b: Surveyed) -> list[Need]:
    """What brings these from the arrays of one into those of the other; nothing where one of them keeps none."""
    mine, its = ([one for one in kept(x) if set(one.ours) & set(ours)] for x in (a, b))
    of = tuple(part for part in ours if any(part in one.ours for one in mine))
    if not mine or {part for one in its for part in one.ours} != set(of):
        return []
    if {(one.ours, one.axes) for one in mine} == {(one.ours, one.axes) for one in its}:
        return [Need("as it is" if len(of) == 1 else "as they are", of, idle=True)]
    stacked = [one.stacked for one in mine]
    code = [_rearrange(one.called, one.called, one.axes, one.axes) for one in stacked if one not in mine]
    words = ["stack the experts"] if code else []
    words += ["take the experts apart"] if any(one.stacked != one for one in its) else []
    into = [one.stacked for one in its]
    if len(stacked) == len(into):
        by_ours = {one.ours: one for one in into}
        for one in stacked:
            what, how = _rearranged(one, by_ours.get(one.ours, into[0]))
            words, code = words + what, code + how
    elif len(stacked) == 1:
        (whole,), axes = stacked, into[0].axes
        words += [f"take gate and up apart, which stand {_stand(whole)}", *_turned(whole.axes, axes)]
        code.append(_rearrange(", ".join(whole.ours), whole.called, whole.axes, f"2 {axes}"))
    else:
        (whole,), axes = into, stacked[0].axes
        words += [f"put gate and up into one, {_stand(whole)}", *_turned(axes, whole.axes)]
        code.append(_rearrange(whole.called, f"[{', '.join(whole.ours)}]", f"2 {axes}", whole.axes))
    return [Need("; ".join(dict.fromkeys(words)), of, "; ".join(code))]


def _rearranged(a: Kept, b: Kept) -> tuple[list[str], list[str]]:
    """In words and in code, what brings an array into the form of another; nothing where it has that."""
    words = _turned(a.axes, b.axes)
    if len(a.ours) == 2 and _by_turns(a) != _by_turns(b):
        words.append(f"gate and up, which stand {_stand(a)}, have to stand {_stand(b)}")
    elif len(a.ours) == 2 and (a.ours, "(" in a.axes) != (b.ours, "(" in b.axes):
        words.append(f"gate and up have to stand {_stand(b)}")
    if not words:
        return [], []
    if a.ours == b.ours:
        return words, [_rearrange(b.called, a.called, a.axes, b.axes)]
    plain, both = f"2 {' '.join(_letters(a.axes))}", f"[{', '.join(b.ours)}]"
    return words, [
        _rearrange(", ".join(a.ours), a.called, a.axes, plain),
        _rearrange(b.called, both, plain, b.axes),
    ]


def _rearrange(into: str, of: str, a: str, b: str) -> str:
    """Code that brings axes into others, by einops."""
    return f"{into} = rearrange({of}, '{_einops(a)} -> {_einops(b)}'{', two=2' * ('(' in a)})"


def _einops(axes: str) -> str:
    return axes.replace("2", "two")


def _letters(axes: str) -> list[str]:
    """Axes in their order, without what stands for gate and up, and without those of one."""
    return [letter for letter in re.findall(r"\w+", axes) if letter not in ("2", "1")]


def _by_turns(one: Kept) -> bool:
    return "F 2" in one.axes


def _stand(one: Kept) -> str:
    """How gate and up stand in one array."""
    how = (
        "one after the other" if "(2 F)" in one.axes else "by turns" if _by_turns(one) else "along an axis of their own"
    )
    return how + ("" if "gate" in one.ours[0] else ", up first")


def _turned(a: str, b: str) -> list[str]:
    """In words, what brings axes into another order; nothing where they have it."""
    mine, its = _letters(a), _letters(b)
    if mine == its:
        ones = len(re.findall(r"\b1\b", b)) - len(re.findall(r"\b1\b", a))
        return ["add an axis of one"] if ones > 0 else ["drop the axis of one"] if ones < 0 else []
    if len(mine) == 2:
        return ["transpose"]
    if mine[0] == its[0]:
        return ["swap the last two axes"]
    return [f"bring the axes from {' '.join(mine)} to {' '.join(its)}"]


# ---- What weights make up for


class Mended(NamedTuple):
    """Of these findings, all that there is to say."""

    needs: list[Need]
    remains: list[Remain]
    keys: set[str]


NOTHING = Mended([], [], set())


def _lacking(a: Surveyed, b: Surveyed) -> Mended:
    """Parameters that one of them has."""
    needs, remains, keys = [], [], set()
    for key, (ours, neutral) in NEUTRAL.items():
        mine, its = (any(has(x, one) for one in ours) for x in (a, b))
        routed = STAGE[key] != "route" or (has(a, "router") and has(b, "router"))
        if mine == its or not routed:
            continue
        keys.add(key)
        if its:
            parts = ("shared_w_down",) if key == "shared expert" else ours
            needs.append(Need(f"{{a}} has no {key}: set {neutral} in {{b}}", tuple(p for p in parts if has(b, p))))
        elif key == "scale of experts" and _on_output(a, b):
            of = _both(a, b, "w_down", "b_down")
            by = {one: f"{one} * expert_scale[:, None{', None' * (one == 'w_down')}]" for one in of}
            needs.append(
                Need("{b} has no scale of experts: multiply what each expert returns by its own", of, _changed(b, by))
            )
        else:
            what = "its way down is zero" if key == "shared expert" else f"it is {neutral}"
            shows = f"unless {what} in {{a}}"
            remains.append(Remain(key, _what(a, key) or "has one", "has none", "some weights", shows))
    if has(a, "router") != has(b, "router"):
        none, other = ("{b}", "{a}") if has(a, "router") else ("{a}", "{b}")
        needs.append(
            Need(f"{none} has no router: it is given the experts of each token, and scores, as {other} has them")
        )
    if has(b, "shared_score") and not has(a, "shared_score") and has(a, "shared_w_down"):
        of, code = ("shared_score", "shared_w_down"), _changed(b, {"shared_w_down": "2 * shared_w_down"})
        what = "{a} has no score of the shared expert: set zero in {b}, whose sigmoid is 1/2, and double the way down"
        needs.append(Need(what, of, code))
        if _what(a, "shared expert") == "added":
            keys.add("shared expert")
    if _gated(a) != _gated(b):
        words = {True: "have a gate", False: "have no gate: activation(x @ w_up) @ w_down"}
        remains.append(Remain("experts", words[_gated(a)], words[_gated(b)], *EVERYWHERE))
    return Mended(needs, remains, keys)


def _scaled(a: Surveyed, b: Surveyed) -> Mended:
    """Scales of scores, which go into the way down."""
    mine, its = (_number(x, "scale") for x in (a, b))
    if mine is None or its is None or mine == its:
        return NOTHING
    if not _on_output(a, b) or its == 0:
        return Mended([], [Remain("scale", f"{mine:g}", f"{its:g}", *EVERYWHERE)], {"scale"})
    setting = ", or set the scale in the configuration of {b}, which has one" if "scale" in b.states else ""
    of = _both(a, b, "w_down", "b_down")
    by = f"{mine / its:.7g}"
    what = f"the scale is {mine:g} in {{a}} and {its:g} in {{b}}: multiply by {by}{setting}"
    return Mended([Need(what, of, _changed(b, {one: f"{by} * {one}" for one in of}))], [], {"scale"})


def _stretched(a: Surveyed, b: Surveyed) -> Mended:
    """The one activation that is another of stretched gates, where nothing clamps these."""
    assert a.card
    assert b.card
    mine, its = a.card.case, b.card.case
    by = {("quick_gelu", "silu"): QUICK, ("silu", "quick_gelu"): 1 / QUICK}.get((mine.activation, its.activation))
    told = all(one and one.state == "found" for one in (a.card.get("activation"), b.card.get("activation")))
    if by is None or not told or its.clamp is not None or _gated(a) != _gated(b):
        return NOTHING
    of = _both(a, b, *(("w_gate", "b_gate") if _gated(a) else ("w_up", "b_up")))
    code = _changed(b, {one: f"{by:.7g} * {one}" for one in of} | {"w_down": f"w_down / {by:.7g}"})
    what = f"quick_gelu(g) is silu({QUICK} g) / {QUICK}: multiply by {by:.7g} before it, and divide by that behind it"
    return Mended([Need(what, (*of, "w_down"), code)], [], {"activation"})


def _lifted(a: Surveyed, b: Surveyed) -> Mended:
    """What is added to up, where the other has a bias for it and nothing is clamped between."""
    assert a.card
    assert b.card
    mine, its = a.card.case, b.card.case
    more = mine.up_offset - its.up_offset
    if not more or not has(b, "b_up") or mine.clamp is not None or its.clamp is not None:
        return NOTHING
    what = f"{{a}} adds {mine.up_offset:g} to up and {{b}} {its.up_offset:g}: add {more:g} to the bias"
    return Mended([Need(what, ("b_up",), _changed(b, {"b_up": f"b_up + {more:g}"}))], [], {"added to up"})


def _changed(b: Surveyed, changes: Mapping[str, str]) -> str:
    """Code that changes these in the form in which `b` keeps them."""
    if not b.stored:
        return "; ".join(f"{ours} = {how}" for ours, how in changes.items())
    code = []
    for one in (own.stacked for own in kept(b)):
        mine = [f"{ours} = {changes[ours]}" for ours in one.ours if ours in changes]
        if mine and len(one.ours) == 2:
            plain, both = " ".join(_letters(one.axes)), ", ".join(one.ours)
            code.append(_rearrange(both, one.called, one.axes, f"2 {plain}"))
            mine.append(_rearrange(one.called, f"[{both}]", f"2 {plain}", one.axes))
        code += mine
    return "; ".join(code)


def _both(a: Surveyed, b: Surveyed, *ours: str) -> tuple[str, ...]:
    return tuple(one for one in ours if has(a, one) and has(b, one))


def _gated(one: Surveyed) -> bool:
    return has(one, "w_gate")


def _on_output(*layers: Surveyed) -> bool:
    """Whether scores multiply what experts return, so that what multiplies scores may as well be in the way down."""
    return all(one.card is not None and one.card.case.score_on == "output" for one in layers)


def _number(one: Surveyed, key: str) -> float | None:
    finding = one.card.get(key) if one.card else None
    return None if finding is None or finding.state != "found" else float(finding.what.removeprefix("about "))


# ---- Findings


def said(card: Card, finding: Finding | None) -> str:
    """What a card says, in the same words for what is the same in cases of other sizes; or an empty string."""
    if finding is None:
        return ""
    if finding.key == "experts of a token" and finding.what == str(card.asked.top_k):
        return "as many as asked for"
    if finding.key == "gradients" and finding.state == "found":
        return "the derivative of the output"
    if finding.what.startswith(BOUND):
        return "nothing that shows"
    return finding.what


def _what(one: Surveyed, key: str) -> str:
    finding = one.card.get(key) if one.card else None
    return finding.what if finding else ""


def _differences(a: Surveyed, b: Surveyed, mended: set[str]) -> Iterable[tuple[Remain, bool]]:
    """Findings in which two cards differ, and whether that is sure."""
    assert a.card
    assert b.card
    mine, its = ({finding.key: finding for finding in card.findings} for card in (a.card, b.card))
    words = {key: (said(a.card, mine.get(key)), said(b.card, its.get(key))) for key in mine | its}
    other = [key for key, (own, another) in words.items() if own != another]
    sure = {key for key in other if _certain(a.card, b.card, mine.get(key), its.get(key))}
    wrong = {key for key in other if key.startswith("gradient d")}
    follow = sure | mended | ({"experts"} if _gated(a) != _gated(b) else set())
    for key in other:
        if key in mended or FOLLOWS.get(key, set()) & follow or (key == "gradients" and wrong):
            continue
        level, shows = ("training", "in training") if key in wrong else SHOWS.get(key, EVERYWHERE)
        if key == "other tokens" and not any("the output" in one for one in words[key]):
            level, shows = "roundings", "in roundings, where other tokens are others"
        usual = "the derivative" if key in wrong else "yes" if key == "finite" else ""
        own, another = (one or usual or "not said" for one in words[key])
        yield Remain(key, own, another, level, shows + _setting(b, mine.get(key))), bool(usual) or key in sure


def _setting(b: Surveyed, finding: Finding | None) -> str:
    """That the other has a setting for what is found of one."""
    fields = [name for name in (finding.fields if finding else ()) if name in b.states]
    if not fields:
        return ""
    of = ", ".join(f"{name} {b.states[name]}" for name in fields)
    return f"; the configuration of {{b}} has a setting for it, now {of}"


def _certain(a: Card, b: Card, mine: Finding | None, its: Finding | None) -> bool:
    """Whether two cards, which differ in a finding, say what cannot both be so."""
    if mine is None or its is None or not (told(mine) and told(its)):
        return False
    words = [set(one.what.removeprefix(CANNOT_TELL).split(OR)) for one in (mine, its)]
    if words[0] & words[1]:
        return False
    if mine.key == "of equal scores" and (a.asked.experts, a.asked.top_k) != (b.asked.experts, b.asked.top_k):
        return any(one.what.startswith("the lower") for one in (mine, its))  # others go by how many there are
    if mine.key == "sum over the chosen" and min(a.asked.top_k, b.asked.top_k) <= 2:  # of two there is no order
        plain = [
            {re.sub(r"^(in order of|from the last of|from the last) \w+, ", "", one) for one in of} for of in words
        ]
        return not plain[0] & plain[1]
    return _apart(mine.what, its.what) if mine.key == "added to the sum" else True


def told(finding: Finding) -> bool:
    """Whether a finding says what is, or a few things of which one is."""
    open_ended = finding.state == "cannot tell" and OR not in finding.what
    return finding.state != "unknown" and not open_ended and finding.what != GIVEN


def _apart(a: str, b: str) -> bool:
    """Whether of two numbers, one of which may be no more than a bound, the one exceeds the other."""
    bounds = [float(one.removeprefix(BOUND)) for one in (a, b) if one.startswith(BOUND)]
    numbers = [float(one) for one in (a, b) if not one.startswith(BOUND)]
    return bool(numbers) and max(numbers) >= max([*bounds, 0.0]) if bounds else a != b


# ---- Measured


class Measured(NamedTuple):
    """How far two layers are apart on one common problem."""

    problem: str
    worst: str  # the quantity
    apart: float  # of it, with scales made up for where that is known

    def words(self, dtype: str) -> str:
        """What that comes to."""
        if self.apart <= tolerance(dtype):
            return "the same to rounding"
        return f"{percent(self.apart)} apart, most in {self.worst}"


def ordered(differences: Sequence[Difference]) -> list[Difference]:
    """The plain problem first, and of each the output first."""

    def place(name: str) -> int:
        return ORDER.index(name) if name in ORDER else len(ORDER)

    return [
        replace(one, apart={name: one.apart[name] for name in sorted(one.apart, key=place)})
        for one in sorted(differences, key=lambda one: (one.problem != "plain", one.problem))
    ]


def measured(differences: Sequence[Difference]) -> list[Measured]:
    """The largest difference of each common problem."""
    found = []
    for one in ordered(differences):
        best = {name: min(value, one.scaled.get(name, math.inf)) for name, value in one.apart.items()}
        if best:
            worst = max(best, key=lambda name: math.inf if math.isnan(best[name]) else best[name])
            found.append(Measured(one.problem, worst, best[worst]))
    return found


def percent(value: float) -> str:
    """Of a number, in two digits."""
    if not math.isfinite(value):
        return "without bound"
    digits = float(f"{100 * value if value < 10 else value:.2g}")
    return f"{digits:g}%" if value < 10 else f"{digits:g} times"


# ---- As text


def text(a: Surveyed, b: Surveyed, differences: Sequence[Difference] = ()) -> str:
    """The way from one layer to the other, as Markdown."""
    found = moving(a, b)

    def named(words: str) -> str:
        return words.replace("{a}", a.layer).replace("{b}", b.layer)

    lines = [f"### From {a.layer} to {b.layer}, {a.dtype}", "", named(found.verdict), ""]
    lines += [f"- {words}" for one in (a, b) for words in warnings(one)]
    lines += [""] * (lines[-1] != "") + ["What moving weights needs:", ""]
    for need in found.needs:
        code = f": `{need.code}`" if need.code else ""
        lines.append(f"- {names(need, a, b)}{named(need.what)}{code}")
    for title, of in (("What no conversion mends:", found.remains), ("What cannot be told:", found.unsure)):
        if of:
            lines += ["", title, "", f"| | {a.layer} | {b.layer} | shows |", "|---|---|---|---|"]
            rows = ((one.key, one.a, one.b, named(one.shows)) for one in of)
            lines += [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows]
    if apart := measured(differences):
        lines += ["", "Measured, as a part of the largest number:", ""]
        lines += [f"- {one.problem}: {one.words(a.dtype)}" for one in apart]
        if found.same and any(one.apart > tolerance(a.dtype) for one in apart):
            lines += ["", UNEXPLAINED]
    return "\n".join(lines) + "\n"


def warnings(one: Surveyed) -> list[str]:
    """What has to be said of a layer before anything else."""
    unproved = [f"{one.layer} is not proved: {one.card.proof}"] if one.card and not one.card.proved else []
    return unproved + [f"{one.layer}: {disobeyed(one, field)}" for field in one.disobeyed]


def disobeyed(one: Surveyed, field: str) -> str:
    """In words, a setting that its layer does not obey."""
    assert one.card
    return f"its configuration says {field} {one.states[field]}, the layer does {getattr(one.card.case, field)}"


def names(need: Need, a: Surveyed, b: Surveyed) -> str:
    """What the arrays are called here and there, before what is to be done."""
    if not need.of:
        return ""
    called = [" + ".join(one.name for one in kept(x) if set(one.ours) & set(need.of)) for x in (a, b)]
    where = ARROW.join(dict.fromkeys(filter(None, called)))
    return f"{', '.join(need.of)}{f' ({where})' if where else ''}: "

"""The simulation against routings drawn token by token, its formula by hand, and the measured points it rests on."""

from dataclasses import replace

import numpy as np
import pytest
from problems import gamma
from safetensors.numpy import save_file

from parity.cases.case import Case
from parity.judge.records import header
from parity.study import simulate
from parity.study.part import Study
from parity.study.routing import counts, needed_factor, recorded_routing, zipf_routing
from parity.study.simulate import (
    LINKS,
    Popularity,
    by_link,
    draw_counts,
    fit,
    inclusion,
    recorded_counts,
    seconds_of,
    zipf,
)

EXACT = gamma(64, "float64")  # of figures that are the same formula in another order
CASE = Case("small", ranks=4, tokens=256, width=64, hidden=64, experts=16, top_k=2, dtype="bfloat16")


def test_inclusion_adds_up_and_one_choice_is_the_weight():
    weight = np.array([4.0, 2, 1, 1])
    np.testing.assert_allclose(inclusion(weight, 1), weight / 8, rtol=0, atol=0.012)  # 4 standard errors
    assert inclusion(weight, 3).sum() == pytest.approx(3, rel=EXACT)
    assert inclusion(np.ones(4), 4).tolist() == [1] * 4


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_loads_are_those_of_tokens_that_choose(skew):
    """Counts drawn without tokens against tokens drawn one by one: busiest rank, and factors needed, within 3%."""
    routing = zipf_routing(CASE, skew, 200)
    drawn = counts(routing)
    # Which expert is how popular is drawn apart: it is given here.
    pi_E = drawn.sum(axis=(0, 1)) / (200 * CASE.ranks * CASE.tokens)
    rng = np.random.default_rng(0)
    made = np.stack([draw_counts(Popularity("", pi_E, np.inf), 4, 256, 2, rng) for _ in range(200)])
    for per in ("rank", "expert"):
        ours, theirs = (np.median(needed_factor(c, 2, 256, per)) for c in (made, drawn))
        # 4 standard errors of two medians of 200 draws that are spread by 6% at most: 4 * 1.25 * 6% * sqrt(2 / 200).
        assert ours == pytest.approx(theirs, rel=0.03)
    ours, theirs = (np.median(c.reshape(200, 4, 4, 4).sum((1, 3)).max(1)) / 512 for c in (made, drawn))
    assert ours == pytest.approx(theirs, rel=0.03)


def test_a_fit_finds_what_a_recording_was_drawn_with(tmp_path):
    """One choice per token, shares drawn anew for each stretch: a skew of 1 and a concentration of 40 come back."""
    rng, E = np.random.default_rng(0), 16
    pi_E = np.arange(1.0, E + 1) ** -1.0
    shares = rng.dirichlet(40 * pi_E / pi_E.sum(), size=400)
    ids = np.concatenate([rng.choice(E, size=(simulate.STRETCH, 1), p=share) for share in shares])
    save_file({"expert_id": ids.astype(np.int32)}, tmp_path / "known.safetensors", {"n_experts": str(E)})
    found = fit(str(tmp_path / "known.safetensors"))
    # 4 and 3 standard deviations of what 30 seeds gave: 0.024, and 5%.
    assert found.skew == pytest.approx(1, abs=0.1)
    assert found.concentration == pytest.approx(40, rel=0.15)


def test_stretches_of_a_recording_have_its_loads():
    whole = counts(recorded_routing(Case(ranks=1, tokens=512, recording="pydoc"), 1))[0, 0] / 512
    rng = np.random.default_rng(0)
    stream = recorded_counts("pydoc", 8, 320, rng)
    mean = np.mean([next(stream) for _ in range(200)], axis=(0, 1)) / 320
    assert mean.sum() == pytest.approx(2, rel=EXACT)
    # Tokens near the ends are in fewer of the stretches: 0.012, and 4 standard deviations of 0.0014.
    np.testing.assert_allclose(mean, whole, rtol=0, atol=0.02)


def test_bytes_by_link_are_those_of_the_rows():
    out = np.arange(16).reshape(4, 4)
    near, far = by_link(out, 2)
    assert near.tolist() == [[0, 1, 0, 0], [4, 0, 0, 0], [0, 0, 0, 11], [0, 0, 14, 0]]
    assert (near + far + np.diag(np.diag(out)) == out).all()


def test_the_formula_by_hand():
    case = replace(CASE, ranks=2, tokens=8, width=10, hidden=20, experts=2, top_k=1)
    links = simulate.Links(nvlink=1e3, network=1.0, latency=0.5, flops=1e4, copy=1e3)
    out = np.array([[3, 5], [2, 6]])
    # 5 rows of 20 bytes over 1000 bytes a second, there and back; 11 rows of 6*10*20 operations; 6*8 + 2*8 rows copied
    assert seconds_of(links, case, out, 11) == pytest.approx(
        2 * (0.5 + 0.1) + 11 * 1200 / 1e4 + 64 * 20 / 1e3, rel=EXACT
    )


def test_measured_points_come_back_out_of_the_links():
    """0.81 ms for half of 32768 x 7168 bfloat16 rows between two H200s: what `LINKS` was taken from."""
    assert 32768 * 7168 * 2 / 2 / LINKS.nvlink == pytest.approx(0.81e-3, rel=EXACT)


@pytest.mark.parametrize("per", ["rank", "expert"])
def test_drops_are_those_of_bins_cut_by_hand(per):
    """One step of a recording, whose counts are known by drawing them again."""
    case = replace(CASE, ranks=4, tokens=128)
    found = simulate.simulate(case, "pydoc", 3, factors=(1.0,))
    stream = recorded_counts("pydoc", 4, 128, np.random.default_rng([0, 7]))
    drawn = np.stack([next(stream) for _ in range(3)])
    bins = drawn.reshape(3, 4, 4, 4).sum(-1) if per == "rank" else drawn
    C = -(-128 * 2 // (4 if per == "rank" else 16))
    static = next(t for t in found.static if t.per == per)
    assert static.dropped == pytest.approx(np.maximum(bins - C, 0).sum() / drawn.sum(), rel=EXACT)
    assert found.busiest.worst == drawn.reshape(3, 4, 4, 4).sum((1, 3)).max() / 256


def test_more_variation_needs_more_capacity():
    even = simulate.simulate(CASE, zipf(16, 2, 0.0), 50)
    varying = simulate.simulate(CASE, zipf(16, 2, 0.0, concentration=20), 50)
    skewed = simulate.simulate(CASE, zipf(16, 2, 1.0), 50)
    assert even.needed_rank.median < varying.needed_rank.median
    assert even.busiest.median < skewed.busiest.median
    assert even.dynamic_seconds
    assert skewed.dynamic_seconds
    assert even.dynamic_seconds.median < skewed.dynamic_seconds.median


def shown(*found: simulate.Simulated) -> dict[str, list[str]]:
    """The table in columns."""
    table = simulate.scale_table(Study(header([]), [*found]))
    assert table
    return dict(zip(table.columns, map(list, zip(*table.rows, strict=True)), strict=True))


def test_a_column_that_is_zero_in_every_row_is_left_out():
    """Up to eight ranks share a node, so that nothing goes over the network; a single rank sends nothing at all."""
    one, four, sixteen = (
        simulate.simulate(replace(CASE, ranks=ranks, width=4096), zipf(16, 2, 0.0), 2) for ranks in (1, 4, 16)
    )
    assert not {"NVLink MB", "network MB"} & shown(one).keys()
    assert "network MB" not in shown(one, four)
    assert float(shown(one, four)["NVLink MB"][1]) > 0
    assert shown(four, sixteen)["network MB"][0] == "0"
    assert float(shown(four, sixteen)["network MB"][1]) > 0


def test_few_bytes_are_not_shown_as_none():
    small = simulate.simulate(replace(CASE, tokens=8), zipf(16, 2, 0.0), 2)
    assert float(shown(small)["NVLink MB"][0]) > 0


def test_times_and_bytes_are_said_to_be_of_a_width_or_left_out(tmp_path):
    """A recording of expert ids has no width, one with x and router no hidden width, and the project's has both."""
    rng = np.random.default_rng(0)
    x, router = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 24), (24, 8)))
    ids = np.argsort(-x @ router, axis=1)[:, :2].astype(np.int32).copy()
    save_file({"expert_id": ids}, tmp_path / "ids.safetensors", {"n_experts": "8"})
    save_file({"expert_id": ids, "x": x, "router": router}, tmp_path / "routed.safetensors")
    none, width, both = (
        simulate.spread_out(recording, 64, 4, 2)[0]
        for recording in (str(tmp_path / "ids.safetensors"), str(tmp_path / "routed.safetensors"), "pydoc")
    )
    assert not {"dynamic ms", "NVLink MB"} & shown(none).keys()
    assert "drops at 1.25, rank bins" in shown(none)
    assert "NVLink MB" in shown(width)
    assert "dynamic ms" not in shown(width)
    together = shown(none, width, both)
    assert [cell == "-" for cell in together["dynamic ms"]] == [True, True, False]
    assert [cell == "-" for cell in together["NVLink MB"]] == [True, False, False]
    table = simulate.scale_table(Study(header([]), [none, width, both]))
    assert table
    assert "in 99% of steps (in all steps, where there are fewer than 100)" in table.title
    assert "routed at its width of 24, in float32; pydoc at its width of 64, in float32; '-' for ids," in table.title

"""How far any two layers are apart, by what they made of the same problems; and which are one function."""

from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from parity.explain.hypotheses import tolerance
from parity.oracle.quantities import OUTSIDE
from parity.survey.moving import moving
from parity.survey.records import Difference, Survey, Surveyed, load

Arrays = dict[str, dict[str, np.ndarray]]  # by problem and quantity

TIES = "of equal scores"
PLAIN = "plain"  # the problem that says how large numbers usually are
ALL = [name.rpartition("/")[2] for name in OUTSIDE]
SHARED = "shared expert"  # begins the names of problems in which the scale is not of all that is added up


def whole(folder: Path) -> Survey:
    """Everything that was surveyed into a folder."""
    layers = load(folder)
    arrays = [_arrays(folder, one) for one in layers]
    apart = {
        f"{i} {j}": found
        for i, j in combinations(range(len(layers)), 2)
        if layers[i].dtype == layers[j].dtype and (found := differences(layers[i], arrays[i], layers[j], arrays[j]))
    }
    return Survey(layers, groups(layers, apart), apart)


def _arrays(folder: Path, one: Surveyed) -> Arrays:
    path, found = folder / "arrays" / f"{one.name}.safetensors", Arrays()
    if one.card is None or not path.exists():
        return found
    for name, a in load_file(path).items():
        problem, _, quantity = name.rpartition("/")
        found.setdefault(problem, {})[quantity] = a
    return found


def differences(a: Surveyed, of_a: Arrays, b: Surveyed, of_b: Arrays) -> list[Difference]:
    """Of each problem that both ran, in order."""
    scales = [one.card.case.scale for one in (a, b) if one.card]
    usual = {name: max(map(largest, (of_a.get(PLAIN, {}).get(name), of_b.get(PLAIN, {}).get(name)))) for name in ALL}
    found = []
    for problem in of_a:
        if problem not in of_b:
            continue
        mine, other = of_a[problem], of_b[problem]
        names = [name for name in ALL if name in mine and name in other]
        one = Difference(problem, {name: distance(mine[name], other[name], usual[name]) for name in names})
        if len(set(scales)) == 2 and 0 not in scales and not problem.startswith(SHARED):
            s, t = scales
            least = min(abs(s), abs(t))
            one.scaled = {name: distance(mine[name] / s, other[name] / t, usual[name] / least) for name in names}
        found.append(one)
    return found


def largest(a: np.ndarray | None) -> float:
    """The largest number; 0 of nothing."""
    return 0.0 if a is None else float(np.abs(a).max(initial=0))


def distance(a: np.ndarray, b: np.ndarray, usual: float = 0.0) -> float:
    """The largest difference over the largest number of both, or over the usual one where they are nearly zero."""
    over = max(largest(a), largest(b), usual)
    return float(np.abs(a.astype(np.float64) - b).max(initial=0)) / over if over else 0.0


def groups(layers: list[Surveyed], apart: dict[str, list[Difference]]) -> list[list[int]]:
    """Layers that are one function: what was measured and found of any two is alike, but for roundings and ties."""
    found: list[list[int]] = []
    for i, one in enumerate(layers):
        if one.card is None:
            continue
        alike = (group for group in found if all(same(layers, apart, j, i) for j in group))
        group = next(alike, None)
        if group is None:
            found.append([i])
        else:
            group.append(i)
    return sorted(found, key=len, reverse=True)


def same(layers: list[Surveyed], apart: dict[str, list[Difference]], i: int, j: int) -> bool:
    """Whether two are one function."""
    a, b = layers[i], layers[j]
    ran = [{problem for problem, why in one.ran.items() if not why} for one in (a, b)]
    found = apart.get(f"{i} {j}", [])
    if a.dtype != b.dtype or ran[0] != ran[1] or not found:
        return False
    allowed = tolerance(a.dtype)
    alike = all(value <= allowed for one in found for value in one.apart.values())
    return alike and not any(one.level != "roundings" and one.key != TIES for one in moving(a, b).remains)

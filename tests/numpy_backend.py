"""A layer that shows nothing of its inside, here in NumPy: all that it takes to put it beside PyTorch and JAX."""

import numpy as np

from parity.oracle.problem import Problem, exact_inputs
from parity.oracle.quantities import OUTSIDE
from parity.run.backend import Backend
from parity.run.supervisor import answer
from parity.run.trace import Trace


def layer(case, x, router, gate, up, down, dout, chosen, kept):  # [N, D], [D, E], [E, D, F] ..., [N, D], [N, E] twice
    power, softmax = np.exp(x @ router), case.score_function == "softmax"
    score = power / power.sum(-1, keepdims=True) if softmax else power / (1 + power)
    total = (score * chosen).sum(-1, keepdims=True) if case.renormalize else 1
    weight, a, b = case.scale * score * kept / total, x @ gate, x @ up
    sigmoid = 1 / (1 + np.exp(-a))
    hidden, dy = a * sigmoid * b, weight.T[:, :, None] * dout
    dweight, dhidden = kept * ((hidden @ down) * dout).sum(-1).T, dy @ down.mT
    da, db = dhidden * b * sigmoid * (1 + a * (1 - sigmoid)), dhidden * a * sigmoid
    dscore = chosen * case.scale / total * (dweight - case.renormalize * (dweight * score).sum(-1)[:, None] / total)
    dlogits = score * (dscore - (dscore * score).sum(-1, keepdims=True) if softmax else dscore * (1 - score))
    dx = (da @ gate.mT + db @ up.mT).sum(0) + dlogits @ router.T
    return np.einsum("ne,end->nd", weight, hidden @ down), dx, x.T @ dlogits, x.T @ da, x.T @ db, hidden.mT @ dy


def run(backend, folder, setting):
    for problem in map(Problem.load, sorted(folder.glob("*.problem"))):
        case, (x, router, weights, dout) = problem.case, exact_inputs(problem)
        one_hot = np.eye(case.experts)[problem.expert_id.reshape(-1, case.top_k)]
        masks = one_hot.sum(1), (one_hot * problem.keep.reshape(-1, case.top_k, 1)).sum(1)
        tokens = (x.reshape(-1, case.width), router, *weights, dout.reshape(-1, case.width), *masks)
        found = dict(zip(OUTSIDE, layer(case, *tokens), strict=True))
        arrays = {name: np.array_split(a.astype(problem.x.dtype), case.ranks) for name, a in found.items()}
        arrays["e2e/route/drouter"] = [found["e2e/route/drouter"].astype(problem.router.dtype)]  # summed over ranks
        Trace(case, backend, {}, arrays=arrays).save(folder)
        answer(case.name)


BACKEND = Backend("numpy", "numpy", "opaque", OUTSIDE, {"": "tests/numpy_backend.py"}, run="numpy_backend:run")

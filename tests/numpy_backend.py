"""A layer that shows nothing of its inside, here in NumPy: all that it takes to put it beside PyTorch and JAX."""

import numpy as np

from parity.oracle.problem import Problem, exact_inputs
from parity.oracle.quantities import ALWAYS
from parity.run.backend import Backend
from parity.run.supervisor import answer
from parity.run.trace import Trace


def layer(case, router, gate, up, down, x, dout, chosen, kept, aux):  # [D, E], [E, D, F], ..., [N, D], ..., [N, E], ...
    power, softmax = np.exp(x @ router), case.score_function == "softmax"
    score = power / power.sum(-1, keepdims=True) if softmax else power / (1 + power)
    total = (score * chosen).sum(-1, keepdims=True) if case.renormalize else 1
    weight, a, b, sigmoid = case.scale * score * kept / total, x @ gate, x @ up, 1 / (1 + np.exp(-x @ gate))
    hidden, dy = a * sigmoid * b, weight.T[:, :, None] * dout
    dweight, dhidden = aux + kept * ((hidden @ down) * dout).sum(-1).T, dy @ down.mT
    da, db = dhidden * b * sigmoid * (1 + a * (1 - sigmoid)), dhidden * a * sigmoid
    dscore = chosen * case.scale / total * (dweight - case.renormalize * (dweight * score).sum(-1)[:, None] / total)
    dlogits = score * (dscore - (dscore * score).sum(-1, keepdims=True) if softmax else dscore * (1 - score))
    dx = (da @ gate.mT + db @ up.mT).sum(0) + dlogits @ router.T
    return np.einsum("ne,end->nd", weight, hidden @ down), dx, x.T @ dlogits, x.T @ da, x.T @ db, hidden.mT @ dy


def run(backend, folder, setting):
    for p in map(Problem.load, sorted(folder.glob("*.problem"))):
        case, (x, learned, dout) = p.case, exact_inputs(p)
        of = (np.einsum("ptke,ptk->pte", np.eye(case.experts)[p.expert_id], a) for a in (p.keep | True, p.keep, p.aux))
        found = layer(case, *learned[:4], *(a.reshape(-1, a.shape[-1]) for a in (x, dout, *of)))
        arrays = {n: np.array_split(a.astype(p.x.dtype), case.ranks) for n, a in zip(ALWAYS, found, strict=True)}
        arrays["e2e/route/drouter"] = [found[2].astype(p.parameters.router.dtype)]  # of all ranks
        Trace(case, backend, {}, arrays=arrays).save(folder)
        answer(case.name)


BACKEND = Backend("numpy", "numpy", "opaque", ALWAYS, {"": "tests/numpy_backend.py"}, run="numpy_backend:run")

"""`python capture_sizes.py FOLDER,WHAT,P ...`: what a compiler sees of the packages in each folder, as lines of JSON.

In a process of its own, as no shapes are checked at run time here: those checks do not capture. Each measurement is a
fork, so that what all need, which takes seconds to import, is imported once.
"""

import os
import sys

import torch._inductor.compile_fx
import torch.testing._internal.distributed.fake_pg


def main(folder: str, what: str, P: int) -> None:
    sys.path.insert(0, folder)
    import msgspec

    from parity.capture.in_torch import captured_graphs, describe, measure, ranks
    from parity.capture.measure import Measured
    from torch_impl import Router, moe_layer

    if what == "step":
        found = measure(P, "torch_impl")
    else:
        found = Measured("torch", what, P, "layer")
        inputs = [torch.zeros(8, 16, dtype=getattr(torch, what)), torch.zeros(16, 2 * P)]
        inputs += [torch.zeros(2, 16, 16, dtype=getattr(torch, what)) for _ in range(3)]
        with ranks(P):
            run = lambda *inputs: moe_layer(*inputs, router=Router(2)).out_TD  # noqa: E731
            graphs, _ = captured_graphs(run, *(a.requires_grad_() for a in inputs))
        describe(found, graphs)
    print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[1:]:
        if os.fork() == 0:
            folder, what, P = job.split(",")
            main(folder, what, int(P))
            os._exit(0)
        os.wait()

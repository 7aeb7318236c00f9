"""Planted faults: small changes to one backend at one stage, some of them modelled on a public report.

A fault is an edit of the source, made in a copy that only the faulty side runs from; the implementations know nothing
of it. An edit whose old text is not there exactly once is refused, so that a fault cannot go stale unnoticed.
"""

import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from parity.oracle.quantities import STAGES

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch_impl", "jax_impl", "parity")


@dataclass(frozen=True)
class Fault:
    """One planted fault: where, what, and a preset that shows it."""

    name: str
    backend: str
    stage: str
    sentence: str
    file: str
    old: str
    new: str
    preset: str = "zipf"
    gpu_only: str = ""  # why it cannot show on a CPU
    shown_by: str = ""  # the test that shows it, where no preset does
    source: str = "constructed"  # or the address of a public report of a bug of this kind in a layer like this


def plant(fault: Fault, folder: Path) -> Path:
    """Copy the packages into `folder` with the fault in them; the folder to run from.

    A kernel would hide a fault in the plain version that it stands for: on a GPU, only faults of kernels leave them on.

    Raises ValueError when the text that the fault changes is not in its file exactly once.
    """
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / fault.file
    source = path.read_text()
    if source.count(fault.old) != 1:
        raise ValueError(
            f"the fault {fault.name} changes {fault.old!r}, which {fault.file} has {source.count(fault.old)} times, "
            "not once: bring the fault up to date with the code"
        )
    path.write_text(source.replace(fault.old, fault.new))
    for kernels in folder.glob("*_impl/kernels.py"):
        if fault.gpu_only != NO_KERNELS:
            kernels.write_text(kernels.read_text() + "\n\ndef use_kernels(x):\n    return False\n")
    return folder


def find(name: str) -> Fault:
    """The fault of that name. Raises ValueError when there is none."""
    if name not in FAULTS:
        near = ", ".join(get_close_matches(name, FAULTS))
        close = f"Did you mean {near}? " if near else ""
        raise ValueError(f"no fault is called {name}. {close}`python -m parity faults` lists all {len(FAULTS)}")
    return FAULTS[name]


NO_KERNELS = "on a CPU the plain versions run"
TOO_LARGE = "tests/test_beyond_int32.py"  # arrays of more than 2^31 elements, for which there is no oracle
_TORCH = [
    ("tie-to-higher-id", "route", "Equal logits go to the higher expert id.", "routing.py",
     "score_Tn.argsort(dim=-1, descending=True, stable=True)[:, :k]",
     "score_Tn.shape[1] - 1 - score_Tn.flip(1).argsort(dim=-1, descending=True, stable=True)[:, :k]", "ties"),
    ("replay-ignored", "route", "A recomputation chooses experts anew instead of replaying the forward's.", "routing.py",
     "if expert_id_TK is None:", "if True:", "zipf"),
    ("router-gradient-wrong", "route", "The renormalising sum is cut from the graph: the loss is right, the router's "
     "gradient is not.", "routing.py",
     "(score_TK.sum(dim=-1, keepdim=True) + epsilon)", "(score_TK.sum(dim=-1, keepdim=True).detach() + epsilon)",
     "sigmoid"),
    ("partial-gradients-not-summed", "route", "Each rank keeps its own part of the router's gradient.",
     "../parity/run/torch_ranks.py", "        dist.all_reduce(total, group=group)\n", "        pass\n", "zipf"),
    ("unstable-sort", "group_by_expert", "Assignments with the same expert come in another order.", "rows.py",
     "key_N.argsort(stable=True)",
     "(key_N * 10**6 - torch.arange(key_N.numel(), device=key_N.device)).argsort()", "zipf"),
    ("gradient-of-last-k-lost", "group_by_expert", "A token's gradient leaves out its last choice.", "rows.py",
     "for slot_T in slot_TK.unbind(dim=1):", "for slot_T in slot_TK.unbind(dim=1)[:-1]:", "zipf"),
    ("token-gradient-in-bfloat16", "group_by_expert", "A token's gradient is summed in its own dtype.", "rows.py",
     "dx_TD = dx_TD + dx_ND[slot_T].to(accum_dtype)", "dx_TD = (dx_TD + dx_ND[slot_T]).to(dx_ND.dtype)", "bfloat16"),
    ("counts-of-wrong-expert", "exchange_counts", "Local experts are counted in reverse.", "exchange.py",
     "_all_to_all(sent_Pe, one_P, one_P, P, group)",
     "_all_to_all(sent_Pe.flip(1), one_P, one_P, P, group)", "zipf"),
    ("splits-swapped", "send_tokens", "Input and output splits change places.", "exchange.py",
     "_all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)",
     "_all_to_all(x_ND, splits.receive_P, splits.send_P, splits.n_received, group)", "zipf"),
    ("row-lost", "send_tokens", "The last row that arrives is lost.", "exchange.py",
     "return _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)",
     "received = _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)\n"
     "    return received * (torch.arange(len(received)) < len(received) - 1)[:, None]", "zipf"),
    ("row-duplicated", "send_tokens", "The first row is sent in place of the second too.", "exchange.py",
     "_all_to_all(x_ND, splits.send_P,",
     "_all_to_all(x_ND[(torch.arange(len(x_ND)) - (torch.arange(len(x_ND)) == 1).long())], splits.send_P,", "zipf"),
    ("idle-rank-detached", "send_tokens", "A rank that receives nothing leaves the graph, and its backward hangs the "
     "others.", "exchange.py",
     "return _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)",
     "received = _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)\n"
     "    return received if len(received) else received.detach().requires_grad_()", "idle-rank"),
    ("stale-buffer", "send_tokens", "Rows are read from the buffer before they arrive: those of the step before.",
     "exchange.py",
     "return _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)",
     "received = _all_to_all(x_ND, splits.send_P, splits.receive_P, splits.n_received, group)\n"
     "    kept = globals().setdefault('_KEPT', {})\n    before = kept.get(received.shape, received)\n"
     "    kept[received.shape] = received.detach().clone()\n"
     "    return received - received.detach() + before.detach() if received.isfinite().all() else received", "zipf"),
    ("rank-and-expert-swapped", "to_expert_major", "Rows are sorted by (source rank, expert) instead of (expert, source "
     "rank).", "rows.py",
     "    source_R = expert_major_source(counts_Pe, output_size)\n",
     "    source_R = torch.arange(output_size, device=counts_Pe.device)\n", "zipf"),
    ("rows-swapped-between-experts", "to_expert_major", "The first and the last row change places.", "rows.py",
     "    return source_R, inverse_permutation(source_R)\n",
     "    source_R = torch.cat([source_R[-1:], source_R[1:-1], source_R[:1]])[:output_size]\n"
     "    return source_R, inverse_permutation(source_R)\n", "zipf"),
    ("off-by-one-group", "apply_experts", "Each expert's rows end one too early.", "matmul.py",
     "return counts_e.cumsum(dim=0).to(torch.int32)",
     "return (counts_e.cumsum(dim=0) - (torch.arange(len(counts_e)) < len(counts_e) - 1).long()).clamp(min=0)"
     ".to(torch.int32)", "zipf"),
    ("silu-on-the-wrong-half", "apply_experts", "silu goes to the up projection instead of the gate.", "experts.py",
     "glu(gate_RF, up_RF, experts)", "glu(up_RF, gate_RF, experts)", "zipf"),
    ("expert-gradient-times-ranks", "apply_experts", "Expert gradients are scaled by the number of ranks, as if they were "
     "replicated.", "experts.py",
     "    gate_RF = None",
     "    w_down_eFD = w_down_eFD * 4 - w_down_eFD.detach() * 3\n    gate_RF = None", "zipf"),
    ("empty-expert-gradient-uninitialised", "apply_experts", "The weight gradient of an expert without rows is never "
     "written.", "experts.py",
     "    hidden_RF = glu(gate_RF, up_RF, experts)\n",
     "    hidden_RF = glu(gate_RF, up_RF, experts)\n"
     "    w_down_eFD.requires_grad and w_down_eFD.register_hook(\n"
     "        lambda dw: dw.where((counts_e > 0)[:, None, None], dw.new_empty(dw.shape))\n"
     "    )\n", "empty-expert"),
    ("stale-weight-gradient", "apply_experts", "The weights' gradient uses the rows of the step before.", "experts.py",
     "    gate_RF = None if w_gate_eDF is None else grouped_linear(x_RD, w_gate_eDF, counts_e, biases.gate_eF)\n",
     "    kept = globals().setdefault('_KEPT', {})\n    before = kept.get(x_RD.shape, x_RD).detach()\n"
     "    kept[x_RD.shape] = x_RD.detach().clone()\n"
     "    stale = grouped_linear(before, w_gate_eDF, counts_e, None)\n"
     "    gate_RF = grouped_linear(x_RD, w_gate_eDF.detach(), counts_e, None) + stale - stale.detach()\n", "one-expert"),
    ("other-tokens-matter", "apply_experts", "Rows are scaled by the largest row that happens to be beside them.",
     "experts.py",
     "    hidden_RF = glu(gate_RF, up_RF, experts)\n",
     "    hidden_RF = glu(gate_RF, up_RF, experts)\n"
     "    hidden_RF = hidden_RF / (1 + 1e-3 * hidden_RF.detach().abs().sum())\n", "zipf"),
    ("inverse-applied-twice", "to_rank_major", "The permutation is applied again instead of undone.", "layout.py",
     "return permute_rows(y_RD, target_R, source_R)", "return permute_rows(y_RD, source_R, target_R)", "zipf"),
    ("backward-not-inverted", "to_rank_major", "Backward gathers by the forward's own index.", "layout.py",
     "return permute_rows(y_RD, target_R, source_R)", "return permute_rows(y_RD, target_R, target_R)", "zipf"),
    ("backward-splits-swapped", "return_tokens", "The exchange's backward sends rows the way the forward did.",
     "exchange.py", "_all_to_all(y_RD, splits.receive_P, splits.send_P, splits.n_sent, group)",
     "_all_to_all(y_RD, splits.receive_P, splits.send_P, splits.n_sent, group) + 0 * y_RD.sum().detach() if y_RD.requires_grad is "
     "False else _all_to_all(y_RD.flip(0), splits.receive_P, splits.send_P, splits.n_sent, group)", "zipf"),
    ("score-applied-twice", "combine", "Rows are weighted by the square of their score.", "rows.py",
     "out_TD = out_TD + score_T.to(accum_dtype)[:, None] *", "out_TD = out_TD + score_T.to(accum_dtype)[:, None] ** 2 *", "zipf"),
    ("score-not-applied", "combine", "Rows are summed without their scores.", "rows.py",
     "out_TD = out_TD + score_T.to(accum_dtype)[:, None] *", "out_TD = out_TD + (0 * score_T + 1).to(accum_dtype)[:, None] *", "zipf"),
    ("score-unsorted", "combine", "Scores in token order weight rows in expert order.", "rows.py",
     "score_N = score_TK.reshape(-1)[assignment_N].to(accum_dtype)", "score_N = score_TK.reshape(-1).to(accum_dtype)", "zipf"),
    ("overwrite-instead-of-add", "combine", "The last choice overwrites the others.", "rows.py",
     "out_TD = out_TD + score_T", "out_TD = score_T", "zipf"),
    ("sum-over-k-in-bfloat16", "combine", "The sum over k is rounded after each term.", "rows.py",
     "* y_ND[slot_T].to(accum_dtype)\n        return", "* y_ND[slot_T].to(accum_dtype)\n            out_TD = out_TD.to(y_ND.dtype)\n"
     "        return", "bfloat16"),
    ("k-in-wrong-order", "combine", "The sum over k runs backwards.", "rows.py",
     "for score_T, slot_T in zip(score_TK.unbind(dim=1), slot_TK.unbind(dim=1), strict=True):",
     "for score_T, slot_T in zip(score_TK.unbind(dim=1)[::-1], slot_TK.unbind(dim=1)[::-1], strict=True):", "k-all"),
    ("accumulator-not-zeroed", "combine", "The sum over k starts from whatever the memory held.", "rows.py",
     "out_TD = torch.zeros(", "out_TD = torch.empty(", "zipf"),
    ("stream-not-waited-for", "to_expert_major", "Rows are gathered on a second stream, which nobody waits for.",
     "layout.py", "    return ExpertMajor(permute_rows(x_RD, source_R, target_R), source_R, target_R)",
     "    import torch\n    with torch.cuda.stream(torch.cuda.Stream()):\n        torch.cuda._sleep(10**9)\n"
     "        x_RD = permute_rows(x_RD, source_R, target_R)\n    return ExpertMajor(x_RD, source_R, target_R)",
     "zipf", "a CPU has no streams"),
    ("tf32-allowed", "apply_experts", "float32 matmuls may use TF32.", "experts.py",
     "    gate_RF = None", "    import torch\n    torch.backends.cuda.matmul.allow_tf32 = True\n    gate_RF = None",
     "pydoc", "a CPU has no TF32"),
    ("kernel-sort-unstable", "group_by_expert", "In a block, those with the same key come in the opposite order.",
     "kernels.py", "(i[:, None] >= i[None, :])", "(i[:, None] <= i[None, :])", "zipf", NO_KERNELS),
    ("kernel-sum-leaves-out-last", "group_by_expert", "Sums over K leave out the last choice.", "kernels.py",
     "for k in tl.static_range(K):\n        source", "for k in tl.static_range(K - 1):\n        source", "zipf", NO_KERNELS),
    ("kernel-segments-by-last-rank", "to_expert_major", "An expert's rows come from the last rank first.", "kernels.py",
     "((expert == j) & (rank < p))", "((expert == j) & (rank > p))", "zipf", NO_KERNELS),
    ("kernel-first-score-for-all", "combine", "Every choice is weighted by the first one's score.", "kernels.py",
     "tl.load(score + t * K + k).to(accum_dtype), 0.0", "tl.load(score + t * K).to(accum_dtype), 0.0", "zipf", NO_KERNELS),
    ("kernel-swiglu-without-slope", "apply_experts", "The gate's gradient takes silu for its slope.", "kernels.py",
     "gradient * u * sigmoid * (1 + g * (1 - sigmoid))", "gradient * u * sigmoid", "bfloat16", NO_KERNELS),
    ("tile-forgotten", "to_expert_major", "Rows past the first 1,024 are those of the first 1,024 again.", "rows.py",
     "return source_R, inverse_permutation(source_R)",
     "return source_R[torch.arange(len(source_R), device=source_R.device) % 1024], inverse_permutation(source_R)", "many-rows"),
    ("kernel-offset-in-32-bits", "to_expert_major", "Rows are written at an offset that is computed in 32 bits.",
     "kernels.py", "    r = (tl.program_id(0) // chunks).to(tl.int64)\n", "    r = tl.program_id(0) // chunks\n", "zipf", NO_KERNELS,
     TOO_LARGE),
    ("state-of-another-forward", "combine", "What the backward needs is kept in one place for all forwards.", "rows.py",
     "ctx.save_for_backward(y_ND, score_TK, slot_TK, assignment_N)",
     "kept = globals().setdefault('_KEPT', {}).setdefault(slot_TK.shape, slot_TK.clone())\n"
     "        kept.data.copy_(slot_TK)\n        ctx.save_for_backward(y_ND, score_TK, kept, assignment_N)", "in-flight"),
    ("index-of-first-step", "combine", "Every step gathers by the index of the first one, whose step is right.",
     "grouping.py", "return weighted_sum(y_ND, score_TK, slot_TK, assignment_N)",
     "kept = globals().setdefault('_KEPT', {})\n"
     "    return weighted_sum(y_ND, score_TK, kept.setdefault(slot_TK.shape, slot_TK), assignment_N)", "in-flight"),
    ("wrong-when-compiled", "combine", "The output is 1% too large where a compiler looks.", "rows.py",
     "return _WeightedSum.apply(y_ND, score_TK, slot_TK, assignment_N).to(y_ND.dtype)",
     "y_ND = y_ND * 1.01 if torch.compiler.is_compiling() else y_ND\n"
     "    return _WeightedSum.apply(y_ND, score_TK, slot_TK, assignment_N).to(y_ND.dtype)", "compiled"),
    ("wrong-when-recomputed", "combine", "The rows that a recomputation keeps are 1% too large.", "rows.py",
     "ctx.save_for_backward(y_ND, score_TK, slot_TK, assignment_N)",
     "scale = 1.01 if torch._C._current_graph_task_id() != -1 else 1\n"
     "        ctx.save_for_backward(y_ND * scale, score_TK, slot_TK, assignment_N)", "recomputed"),
    ("router-gradient-of-the-world", "route", "The router's gradient is summed over the world, not over the group.",
     "../parity/run/torch_ranks.py", "dist.all_reduce(total, group=group)", "dist.all_reduce(total)", "two-groups"),
    ("backward-overwrites-its-gradient", "combine", "The backward clears the gradient that it was given.", "rows.py",
     "y_ND, score_TK, slot_TK, assignment_N = ctx.saved_tensors",
     "y_ND, score_TK, slot_TK, assignment_N = ctx.saved_tensors\n"
     "        dout_TD, given_TD = dout_TD.clone(), dout_TD\n        given_TD.zero_()", "zipf"),
    ("backward-clears-what-it-kept", "combine", "The backward clears the scores that it kept, and a second one has none.",
     "rows.py", "score_N = score_TK.reshape(-1)[assignment_N].to(accum_dtype)",
     "score_N = score_TK.reshape(-1)[assignment_N].to(accum_dtype)\n        score_TK.data.zero_()", "zipf"),
    ("wrong-slots-returned", "group_by_expert", "Rows are right, but the slots returned for a token's choices change places.",
     "grouping.py", "return Grouped(expand_rows(x_TD, slot_TK, assignment_N), slot_TK, assignment_N)",
     "return Grouped(expand_rows(x_TD, slot_TK, assignment_N), slot_TK.flip(1), assignment_N)", "zipf"),
    ("layer-passes-other-counts", "apply_experts", "The layer passes the counts of the experts in reverse.", "layer.py",
     "apply_experts(expert_major.x_RD, counts_Pe.sum(dim=0),",
     "apply_experts(expert_major.x_RD, counts_Pe.sum(dim=0).flip(0),", "zipf"),
    ("one-rank-raises", "send_tokens", "A rank without rows raises.", "exchange.py",
     "    check_splits(splits.n_sent, x_ND.shape[0])\n",
     "    check_splits(splits.n_sent, x_ND.shape[0])\n    if splits.n_received == 0:\n"
     "        raise RuntimeError('nothing arrives here')\n", "idle-rank"),
    ("right-on-first-rank-only", "combine", "The row index is offset by the rank.", "grouping.py",
     "return weighted_sum(y_ND, score_TK, slot_TK, assignment_N)",
     "import torch\n    return weighted_sum(y_ND, score_TK, (slot_TK + torch.distributed.get_rank()) % len(y_ND), assignment_N)", "zipf"),
    ("as-many-tokens-everywhere", "combine", "The compiler is told that no rank has more tokens than this one.", "layer.py",
     "P * (T if max_tokens is None else max_tokens) * min(K, e)", "P * T * min(K, e)", "uneven-compiled"),
    ("selection-bias-in-weights", "route", "The selection bias is part of the weights too.", "routing.py",
     "    score_TK = score_TE.gather(1, clamped_id_TK)\n",
     "    score_TK = (score_TE + per_expert.selection_bias_E).gather(1, clamped_id_TK)\n", "like-deepseek-v3"),
    ("selection-bias-ignored", "route", "Experts are chosen by their scores, without the selection bias.", "routing.py",
     "if selection_bias_E is not None:", "if False:", "like-deepseek-v3"),
    ("selection-bias-before-score", "route", "The selection bias is added to the logits, before the sigmoid.",
     "routing.py", "choose(score_TE, router, per_expert.selection_bias_E)",
     "choose((score_TE.logit() + per_expert.selection_bias_E).sigmoid(), router, None)", "like-deepseek-v3"),
    ("groups-by-best-one", "route", "Groups go by their best expert, not by their best two.", "routing.py",
     '2 if router.group_score == "top2" else 1', "1", "like-deepseek-v3"),
    ("groups-ignored", "route", "Experts are chosen from all groups.", "routing.py",
     "if router.groups > 1:", "if False:", "like-deepseek-v3"),
    ("outside-at-minus-infinity", "route", "Experts outside the best groups can never be chosen, though they count as "
     "zero.", "routing.py", '0 if router.outside_groups == "zero" else -torch.inf', "-torch.inf", "groups-at-zero"),
    ("scale-forgotten", "route", "The scores are not scaled.", "routing.py",
     "score_TK = score_TK * router.scale", "score_TK = score_TK * 1", "like-deepseek-v3"),
    ("epsilon-where-there-is-none", "route", "The sum of scores is guarded by 1e-20 where the model has no guard.",
     "routing.py", "keepdim=True) + epsilon)", "keepdim=True) + max(epsilon, 1e-20))", "no-epsilon"),
    ("softmax-before-choice", "route", "The softmax is over all experts, not over the chosen.", "routing.py",
     "score_TK = torch.softmax(score_TK, dim=-1)", "score_TK = torch.softmax(score_TE, dim=-1).gather(1, clamped_id_TK)",
     "like-gpt-oss"),
    ("router-bias-forgotten", "route", "The logits have no bias.", "routing.py", "logits_TE if bias_E is None else",
     "logits_TE + 0 * bias_E.to(matmul_dtype) if bias_E is not None else", "like-gpt-oss"),
    ("router-in-bfloat16", "route", "The logits are computed in bfloat16, though the router is in float32.", "routing.py",
     'matmul_dtype = x_TD.dtype if dtype == "activations" else logits_dtype', "matmul_dtype = torch.bfloat16", "bfloat16"),
    ("expert-scale-forgotten", "route", "The experts' learned scales multiply nothing.", "routing.py",
     "score_TK = score_TK * take_by_expert(", "score_TK = score_TK + 0 * take_by_expert(", "like-gemma4"),
    ("score-on-the-output", "group_by_expert", "The score multiplies what an expert returns, not what it is given.",
     "routing.py", 'if score_on == "output":', "if True:", "like-llama4"),
    ("up-offset-forgotten", "apply_experts", "The gate multiplies up, and not up + 1.", "glu.py",
     "(up + experts.up_offset)", "up", "like-gpt-oss"),
    ("clamp-on-the-wrong-one", "apply_experts", "The gate is clamped from both sides, and up from above only.", "glu.py",
     "gate.clamp(max=experts.clamp), up.clamp(-experts.clamp, experts.clamp)",
     "gate.clamp(-experts.clamp, experts.clamp), up.clamp(max=experts.clamp)", "like-gpt-oss"),
    ("clamp-forgotten", "apply_experts", "Nothing is clamped.", "glu.py",
     "if experts.clamp is not None:", "if False:", "like-gpt-oss"),
    ("bias-of-the-next-expert", "apply_experts", "Each row gets the bias of the next expert.", "matmul.py",
     "(row_R1 >= end_e - counts_e) & (row_R1 < end_e)", "((row_R1 >= end_e - counts_e) & (row_R1 < end_e)).roll(1, 1)",
     "like-gpt-oss"),
    ("relu-not-squared", "apply_experts", "The activation is a relu, and not its square.", "glu.py",
     "torch.relu(gate) ** 2", "torch.relu(gate)", "like-nemotron-h"),
    ("shared-score-forgotten", "apply_experts", "The shared expert is added whole, without its score.", "experts.py",
     "return score_T.to(x_TD.dtype)[:, None] * y_TD", "return y_TD + 0 * score_T.to(x_TD.dtype)[:, None]",
     "like-qwen3-next"),
    ("shared-expert-twice", "combine", "The shared expert is added once for each choice of a token.", "layer.py",
     "else out_TD + shared_TD", "else out_TD + expert_id_TK.shape[1] * shared_TD", "like-deepseek-v3"),
]  # fmt: skip

_JAX = [
    ("replay-ignored", "route", "A recomputation chooses experts anew instead of replaying the forward's.", "routing.py",
     "if expert_id_TK is None:", "if True:", "zipf"),
    ("renormalise-over-all", "route", "Scores are divided by the sum over all experts, not over the K chosen.",
     "routing.py", "score_TK = renormalized(score_TK, router.epsilon)",
     "score_TK = score_TK / (score_TE.sum(axis=-1, keepdims=True) + router.epsilon)", "sigmoid"),
    ("capacity-in-float32", "group_by_expert", "The capacity is computed in float32, which is off by one.", "grouping.py",
     "Fraction(str(factor)) * n_tokens", "jnp.finfo('float32').dtype.type(float(Fraction(str(factor)))) * n_tokens",
     "capacity-exact"),
    ("one-too-many-kept", "group_by_expert", "A bin keeps one assignment more than it holds.", "grouping.py",
     "return (place_N < take_or_zero", "return (place_N <= take_or_zero", "drop-rank-token"),
    ("drop-by-lowest-score", "group_by_expert", "The highest scores are dropped first.", "grouping.py",
     "else -jax.lax", "else jax.lax", "drop-rank-score"),
    ("drop-ignores-choice", "group_by_expert", "Second choices are kept before later tokens' first choices.",
     "grouping.py", "jnp.arange(N) % top_k", "jnp.arange(N)", "drop-expert-choice"),
    ("drop-ties-backwards", "group_by_expert", "Among equals, the later assignment is kept.", "grouping.py",
     "jnp.lexsort((key_N", "jnp.lexsort((-jnp.arange(N), key_N", "drop-rank-choice"),
    ("padding-not-zeroed", "group_by_expert", "Padding holds the last row instead of zero.", "rows.py",
     '.get(mode="fill", fill_value=0)', '.get(mode="clip")', "zipf"),
    ("receiver-side-offsets", "to_expert_major", "Rows are looked up where they would lie without padding.", "rows.py",
     "jnp.arange(0, S, capacity)[:, None] + counts_Pe.cumsum(axis=1) - counts_Pe",
     "exclusive_cumsum(counts_Pe.reshape(-1)).reshape(counts_Pe.shape)", "zipf"),
    ("padding-reaches-experts", "to_expert_major", "Expert bins are moved whole, whatever their padding holds.",
     "rows.py", "jnp.where(row_C < counts_Pe.T[:, :, None], row_ePC, P * e * capacity)",
     "jnp.where(row_C < counts_Pe.T[:, :, None], row_ePC, row_ePC)", "expert-bins"),
    ("padding-in-last-group", "apply_experts", "The last expert is given the padded rows.", "matmul.py",
     "    y_MF = jax.lax.ragged_dot(",
     "    counts_e = counts_e.at[-1].add(x_MD.shape[0] - counts_e.sum())\n    y_MF = jax.lax.ragged_dot(", "zipf"),
    ("tf32", "apply_experts", "float32 matmuls round their inputs to TF32.", "matmul.py",
     "    y_MF = jax.lax.ragged_dot(x_MD, w_eDF,",
     "    y_MF = jax.lax.ragged_dot(jax.lax.reduce_precision(x_MD, 8, 10), w_eDF,", "zipf"),
    ("gate-and-up-swapped", "apply_experts", "Gate and up projections change places.", "experts.py",
     "glu(gate_MF, up_MF, experts)", "glu(up_MF, gate_MF, experts)", "zipf"),
    ("permute-backward-is-forward", "to_rank_major", "The permutation's backward scatters nothing back.", "layout.py",
     "return permute_rows(y_SD, target_BC, source_S)",
     "return permute_rows(y_SD, target_BC, 0 * source_S)", "zipf"),
    ("returned-to-wrong-rank", "return_tokens", "Bins go back one rank further.", "exchange.py",
     "    return _all_to_all(y_BCD, axis_name)",
     "    return jax.numpy.roll(_all_to_all(y_BCD, axis_name), 1, axis=0)", "zipf"),
    ("renormalise-by-the-square", "route", "The gradient of renormalisation divides by the square of the sum.",
     "routing.py", "    return (dweight_TK - mean_T1) / total_T1, None",
     "    return (dweight_TK * total_T1 - mean_T1 * total_T1) / total_T1**2, None", "tiny-scores"),
    ("softmax-without-maximum", "route", "The softmax takes exponentials of the logits as they are.", "routing.py",
     "partial(jax.nn.softmax, axis=-1)", "lambda a: jnp.exp(a) / jnp.exp(a).sum(axis=-1, keepdims=True)",
     "large-logits"),
    ("wrong-outside-jit", "combine", "The output is 1% too large where nothing is traced.", "rows.py",
     "    return sum_rows(y_MD.reshape(-1, y_MD.shape[-1]), slot_TK, score_TK)",
     "    y_MD = y_MD if 'Dynamic' in type(y_MD).__name__ else y_MD * 1.01\n"
     "    return sum_rows(y_MD.reshape(-1, y_MD.shape[-1]), slot_TK, score_TK)", "eager"),
    ("layer-passes-other-scores", "combine", "The layer passes the squares of the scores.", "layer.py",
     "combine(returned_BCD, weight_TK,", "combine(returned_BCD, weight_TK**2,", "zipf"),
    ("default-precision", "apply_experts", "float32 matmuls take JAX's default precision: TF32 on a GPU.", "matmul.py",
     'y_MF = jax.lax.ragged_dot(x_MD, w_eDF, counts_e, precision="highest")',
     "y_MF = jax.lax.ragged_dot(x_MD, w_eDF, counts_e)", "pydoc", "a CPU has no TF32"),
    ("score-gradient-missing", "combine", "Scores get no gradient.", "rows.py",
     "jnp.stack(dscore_TK, axis=1).astype(score_TK.dtype)", "jnp.zeros_like(score_TK)", "zipf"),
    ("renormalise-after-drops", "combine", "Scores are renormalised over what was kept.", "grouping.py",
     "its score's gradient is zero.\n    \"\"\"\n    return weighted_sum(y_BCD, score_TK, slot_TK, assignment_BC)",
     "its score's gradient is zero.\n    \"\"\"\n    kept_TK = score_TK * (slot_TK < assignment_BC.size)\n"
     "    kept_TK = kept_TK * score_TK.sum(1, keepdims=True) / (kept_TK.sum(1, keepdims=True) + 1e-20)\n"
     "    return weighted_sum(y_BCD, kept_TK, slot_TK, assignment_BC)", "drop-rank-token"),
    ("kernel-sort-unstable", "group_by_expert", "In a block, those with the same key come in the opposite order.",
     "kernels.py", "(i[:, None] >= i[None])", "(i[:, None] <= i[None])", "zipf", NO_KERNELS),
    ("kernel-sum-leaves-out-last", "group_by_expert", "Sums over K leave out the last choice.", "kernels.py",
     "for k in range(slot.shape[1]):", "for k in range(slot.shape[1] - 1):", "zipf", NO_KERNELS),
    ("kernel-first-score-for-all", "combine", "Every choice is weighted by the first one's score.", "kernels.py",
     "score[0][t, k].astype(accum_dtype)", "score[0][t, 0].astype(accum_dtype)", "zipf", NO_KERNELS),
    ("kernel-segments-by-last-rank", "to_expert_major", "An expert's rows come from the last rank first.", "kernels.py",
     "((expert == j) & (rank < p))", "((expert == j) & (rank > p))", "zipf", NO_KERNELS),
    ("kernel-padding-unwritten", "group_by_expert", "Nothing is written where there is padding: it holds what the memory "
     "held, zeros in a process's first step.", "kernels.py", "mask=row < M, other=-1) >= N", "mask=row < M, other=-1) > N",
     "zipf", NO_KERNELS),
    ("counts-in-bfloat16", "route", "Rows for each expert are counted in bfloat16, which has no odd number past 256.",
     "routing.py", "reshape(-1)).sum(axis=1)", "reshape(-1)).astype(jnp.bfloat16).sum(axis=1).astype(int)", "many-rows"),
    ("kernel-offset-in-32-bits", "to_expert_major", "Rows are read at an offset of which 31 bits are kept.", "kernels.py",
     "x.at[source, d]", "x.at[((source * x.shape[1] + d) & 0x7FFFFFFF) // x.shape[1], d]", "zipf", NO_KERNELS, TOO_LARGE),
    ("kernel-weights-of-first-expert", "apply_experts", "Every row is multiplied by the first expert's weights.",
     "kernels.py", "j, first_row, end_row = expert[v], first[v], end[v]",
     "j, first_row, end_row = expert[v] // n_experts * n_experts, first[v], end[v]", "bfloat16", NO_KERNELS),
    ("padding-takes-part", "group_by_expert", "Tokens that are padding, with ids of -1, are sorted before all others.",
     "grouping.py", "(expert_N >= 0) & (expert_N < E)", "expert_N < E", "uneven"),
    ("selection-bias-in-weights", "route", "The selection bias is part of the weights too.", "routing.py",
     "    score_TK = jnp.take_along_axis(score_TE, clamped_id_TK, axis=1)\n",
     "    score_TK = jnp.take_along_axis(score_TE + per_expert.selection_bias_E, clamped_id_TK, axis=1)\n",
     "like-deepseek-v3"),
    ("selection-bias-ignored", "route", "Experts are chosen by their scores, without the selection bias.", "routing.py",
     "if selection_bias_E is not None:", "if False:", "like-deepseek-v3"),
    ("groups-by-best-one", "route", "Groups go by their best expert, not by their best two.", "routing.py",
     '2 if router.group_score == "top2" else 1', "1", "like-deepseek-v3"),
    ("scale-forgotten", "route", "The scores are not scaled.", "routing.py",
     "score_TK = score_TK * router.scale", "score_TK = score_TK * 1", "like-deepseek-v3"),
    ("epsilon-where-there-is-none", "route", "The sum of scores is guarded by 1e-20 where the model has no guard.",
     "routing.py", "    return score_TK / (score_TK.sum(axis=-1, keepdims=True) + epsilon)",
     "    return score_TK / (score_TK.sum(axis=-1, keepdims=True) + 1e-20)", "no-epsilon"),
    ("softmax-before-choice", "route", "The softmax is over all experts, not over the chosen.", "routing.py",
     "score_TK = jax.nn.softmax(score_TK, axis=-1)",
     "score_TK = jnp.take_along_axis(jax.nn.softmax(score_TE, axis=-1), clamped_id_TK, axis=1)", "like-gpt-oss"),
    ("router-in-bfloat16", "route", "The logits are computed in bfloat16, though the router is in float32.", "routing.py",
     'matmul_dtype = x_TD.dtype if dtype == "activations" else logits_dtype', "matmul_dtype = jnp.bfloat16", "bfloat16"),
    ("up-offset-forgotten", "apply_experts", "The gate multiplies up, and not up + 1.", "glu.py",
     "(up + experts.up_offset)", "up", "like-gpt-oss"),
    ("clamp-on-the-wrong-one", "apply_experts", "The gate is clamped from both sides, and up from above only.", "glu.py",
     "clamped(gate, -jnp.inf, experts.clamp), clamped(up, -experts.clamp, experts.clamp)",
     "clamped(gate, -experts.clamp, experts.clamp), clamped(up, -jnp.inf, experts.clamp)", "like-gpt-oss"),
    ("bias-on-padding-only", "apply_experts", "In an expert's own bin, all rows but the first get its bias.", "matmul.py",
     "jnp.ones(y_MF.shape[:2], b_eF.dtype)", "jnp.ones(y_MF.shape[:2], b_eF.dtype).at[:, 0].set(0)", "like-gpt-oss"),
    ("shared-score-forgotten", "apply_experts", "The shared expert is added whole, without its score.", "experts.py",
     "return score_T.astype(x_TD.dtype)[:, None] * y_TD", "return y_TD", "like-qwen3-next"),
    ("shared-expert-forgotten", "combine", "The shared expert is computed, and not added.", "layer.py",
     "else out_TD + shared_TD", "else out_TD", "like-deepseek-v3"),
]  # fmt: skip

_TORCH_STATIC = [
    ("one-too-many-kept", "group_by_expert", "A bin keeps one assignment more than it holds.", "grouping.py",
     "return (place_N < take_or_zero", "return (place_N <= take_or_zero", "drop-rank-token"),
    ("drop-by-lowest-score", "group_by_expert", "The highest scores are dropped first.", "grouping.py",
     "else -score_N", "else score_N", "drop-expert-score"),
    ("padding-reaches-experts", "to_expert_major", "Expert bins are moved whole, whatever their padding holds.",
     "rows.py", "torch.where(row_C < counts_Pe.T[:, :, None], row_ePC, P * e * capacity)",
     "torch.where(row_C < counts_Pe.T[:, :, None], row_ePC, row_ePC)", "expert-bins"),
    ("bins-returned-to-wrong-rank", "return_tokens", "Bins go back one rank further.", "exchange.py",
     "return _AllToAll.apply(y_BCD, group)", "return _AllToAll.apply(y_BCD, group).roll(1, 0)", "zipf"),
    ("capacity-of-own-tokens", "group_by_expert", "A bin's size is computed from this rank's own number of tokens.",
     "grouping.py", "return (place_N < take_or_zero(start_B, bin_N) + C)",
     "return (place_N < take_or_zero(start_B, bin_N) + min(C, N // B))", "uneven-drop"),
    ("kernel-padding-unwritten", "group_by_expert", "Nothing is written where there is padding: it holds what the memory "
     "held, zeros in a process's first step.", "../torch_impl/kernels.py", "mask=row < M, other=-1) >= N",
     "mask=row < M, other=-1) > N", "zipf", NO_KERNELS),
]  # fmt: skip

_TORCH_DIRECT = [
    ("order-by-last-assignment", "group_by_expert", "Assignments with the same expert come in the opposite order.",
     "grouping.py", "    slot_TK = torch.where(valid_TK, slot_N",
     "    slot_N = sort_by_key(expert_N.flip(0), E)[1].flip(0)\n    slot_TK = torch.where(valid_TK, slot_N"),
    ("counts-of-another-rank", "exchange_counts", "Each rank's counts are read as those of the next.", "exchange.py",
     "return own_PE.clone()", "return own_PE.roll(1, 0)"),
    ("start-of-sender-forgotten", "to_expert_major", "A row's place leaves out where its sender's slots of that expert "
     "start.", "rows.py", "shift_PE = row_PE - start_PE", "shift_PE = row_PE"),
    ("senders-on-top-of-each-other", "to_expert_major", "All ranks' rows for an expert start where the first one's do.",
     "rows.py", ".reshape(P, e, P).permute(2, 0, 1)", ".reshape(P, e, P)[:, :, :1].expand(P, e, P).permute(2, 0, 1)"),
    ("nowhere-is-a-place", "to_expert_major", "What comes from nowhere is taken to come from the first slot.", "rows.py",
     "row_O + take_or_zero(shift_G, segment_O), -1)", "row_O + take_or_zero(shift_G, segment_O), 0)"),
    ("only-first-choice-sent", "send_tokens", "A token goes to the first of its places alone.", "exchange.py",
     "value=-1)[slot_TK]\n",
     "value=-1)[slot_TK]\n"
     "    place_TK = place_TK.where(torch.arange(place_TK.shape[1], device=place_TK.device) < 1, -1)\n"),
    ("sent-once-to-first-choice", "send_tokens", "A token goes once, but only to the rank of its first choice.", "rows.py",
     "(place_TK[:, :, None] // n_rows == rank_P).any(dim=1)", "place_TK[:, :1] // n_rows == rank_P", "bfloat16"),
    ("places-of-fewer-tokens", "send_tokens", "Where tokens go is told for all of a rank's tokens but the last.", "rows.py",
     "all_places_TK[:T] = place_TK", "all_places_TK[: T - 1] = place_TK[:-1]", "bfloat16"),
    ("copied-to-places-elsewhere", "send_tokens", "A token that arrived once is copied to places of other ranks, too.",
     "rows.py", "torch.where(place_AK // n_rows == rank, place_AK % n_rows, -1)",
     "torch.where(place_AK >= 0, place_AK % n_rows, -1)", "bfloat16"),
    ("k-in-wrong-order", "send_tokens", "A token's gradient sums its choices from the last to the first.", "exchange.py",
     "[: slot_TK.numel()], slot_TK), None", "[: slot_TK.numel()], slot_TK.flip(1)), None", "k-all"),
    ("gradient-read-too-early", "send_tokens", "A token's gradient is read before the rows are back.", "exchange.py",
     "        put_rows(dx_RD, origin_R[:, None], ctx.buffers.dx_ND)\n"
     "        return sum_rows(ctx.buffers.dx_ND.own_OD[: slot_TK.numel()], slot_TK)",
     "        dx_TD = sum_rows(ctx.buffers.dx_ND.own_OD[: slot_TK.numel()], slot_TK)\n"
     "        put_rows(dx_RD, origin_R[:, None], ctx.buffers.dx_ND)\n        return dx_TD"),
    ("gradient-without-scores", "combine", "A row's gradient is its token's, without the score.", "grouping.py",
     "buffers.dy_RD, buffers, score_TK)", "buffers.dy_RD, buffers, torch.ones_like(score_TK))"),
    ("counts-of-first-rank", "apply_experts", "Every rank groups its rows by the counts of the first rank's experts.",
     "layer.py", "chunk(n_ranks)[buffers.rank]", "chunk(n_ranks)[0]"),
    ("returned-to-neighbour", "return_tokens", "Rows return to the slot beside their own.", "exchange.py",
     "put_rows(y_RD, origin_R[:, None], buffers.returned_ND)",
     "put_rows(y_RD, (origin_R ^ 1)[:, None], buffers.returned_ND)"),
    ("gradient-in-another-buffer", "combine", "Gradients are written over the rows that were sent.", "grouping.py",
     "place_N, buffers.dy_RD, buffers", "place_N, buffers.placed_RD, buffers"),
    ("barrier-left-out", "exchange_counts", "Nobody waits for what the others write.", "rows.py",
     "buffer.handle.barrier(channel=0)", "pass", "zipf", NO_KERNELS),
    ("kernel-places-by-last-sender", "to_expert_major", "An expert's rows come from the last rank first.",
     "../torch_impl/kernels.py", "((expert == g) & (sender < p))", "((expert == g) & (sender > p))", "zipf", NO_KERNELS),
    ("kernel-puts-to-first-place-only", "exchange_counts", "A row goes to the first of its places alone.",
     "../torch_impl/kernels.py", "for k in tl.static_range(K):\n            target", "for k in tl.static_range(1):\n            target",
     "zipf", NO_KERNELS),
]  # fmt: skip

_JAX_DIRECT = [
    ("order-by-last-assignment", "group_by_expert", "Assignments with the same expert come in the opposite order.",
     "grouping.py", "_, slot_N = sort_by_key(expert_N, E)",
     "slot_N = sort_by_key(expert_N[::-1], E)[1][::-1]"),
    ("counts-of-another-rank", "exchange_counts", "Each rank's counts are read as those of the next.", "exchange.py",
     "jax.lax.all_gather(counts_E, axis_name)", "jnp.roll(jax.lax.all_gather(counts_E, axis_name), 1, axis=0)"),
    ("start-of-sender-forgotten", "to_expert_major", "A row's place leaves out where its sender's slots of that expert "
     "start.", "rows.py", "shift_PE = row_PE - start_PE", "shift_PE = row_PE"),
    ("rows-of-the-next-rank", "send_tokens", "One rank's rows are written to the places of the next one's.", "rows.py",
     "return of_all(x_MD), jnp", "return jnp.roll(of_all(x_MD), len(x_MD), axis=0), jnp"),
    ("k-in-wrong-order", "send_tokens", "A token's gradient sums its choices from the last to the first.", "exchange.py",
     "return sum_rows(dx_ND, slot_TK), None", "return sum_rows(dx_ND, slot_TK[:, ::-1]), None", "k-all"),
    ("counts-of-first-rank", "apply_experts", "Every rank groups its rows by the counts of the first rank's experts.",
     "layer.py", "[ranks_of(axis_name).own]", "[0]"),
    ("returned-to-neighbour", "return_tokens", "Rows return to the slot beside their own.", "exchange.py",
     "stop_gradient(y_RD), origin_R[:, None]", "stop_gradient(y_RD), (origin_R ^ 1)[:, None]"),
    ("gradient-without-scores", "combine", "A row's gradient is its token's, without the score.", "grouping.py",
     "ranks, score_TK)\n    return dy_RD", "ranks, jnp.ones_like(score_TK))\n    return dy_RD"),
]  # fmt: skip

_PLANTED = (
    ("torch", "torch_impl", _TORCH),
    ("jax", "jax_impl", _JAX),
    ("torch-static", "torch_impl/static", _TORCH_STATIC),
    ("torch-direct", "torch_impl/direct", _TORCH_DIRECT),
    ("jax-direct", "jax_impl/direct", _JAX_DIRECT),
)
# Reports of a bug of the same kind: the same mistake, in other code, and not always at the same place in it.
REPORTED = {
    "torch-replay-ignored": "NVIDIA-NeMo/Automodel/pull/3140",  # a recomputation takes the top k of ties anew
    "jax-replay-ignored": "NVIDIA-NeMo/Automodel/pull/3140",
    "torch-partial-gradients-not-summed": "pytorch/torchtitan/issues/2387",
    "torch-unstable-sort": "sgl-project/sglang/pull/33511",
    "torch-idle-rank-detached": "PaddlePaddle/PaddleFormers/pull/3010",
    "torch-stale-buffer": "deepseek-ai/DeepGEMM/pull/451",  # a flag of the step before says that rows are there
    "torch-rank-and-expert-swapped": "facebookresearch/fairscale/pull/184",  # with several experts on a rank
    "torch-silu-on-the-wrong-half": "sgl-project/sglang/pull/32430",
    "jax-gate-and-up-swapped": "sgl-project/sglang/pull/32430",
    "torch-expert-gradient-times-ranks": "NVIDIA/Megatron-LM/pull/5956",
    "torch-empty-expert-gradient-uninitialised": "meta-pytorch/MSLK/pull/158",
    "torch-other-tokens-matter": "vllm-project/vllm/pull/57092",  # one scale for all rows, from the largest
    "torch-score-applied-twice": "vllm-project/vllm/pull/43694",
    "torch-overwrite-instead-of-add": "AviSoori1x/makeMoE/issues/2",
    "torch-sum-over-k-in-bfloat16": "NVIDIA/TensorRT-LLM/pull/16778",
    "torch-accumulator-not-zeroed": "vllm-project/vllm-ascend/pull/9992",
    "torch-stream-not-waited-for": "pytorch/torchtitan/issues/3413",
    "torch-one-rank-raises": "NVIDIA/Megatron-LM/pull/3626",
    "torch-right-on-first-rank-only": "flashinfer-ai/flashinfer/issues/3547",
    "jax-score-gradient-missing": "NVIDIA-NeMo/Automodel/pull/2995",
    "jax-padding-reaches-experts": "NVIDIA/TransformerEngine/pull/3116",  # in review: NaN of padding in the gradient
    "torch-static-padding-reaches-experts": "NVIDIA/TransformerEngine/pull/3116",
}
FAULTS = {
    f"{backend}-{name}": Fault(
        f"{backend}-{name}", backend, stage, sentence, file.removeprefix("../") if "/" in file else f"{folder}/{file}", *more,
        source=f"https://github.com/{report}" if (report := REPORTED.get(f"{backend}-{name}")) else "constructed",
    )
    for backend, folder, faults in _PLANTED
    for name, stage, sentence, file, *more in faults
}  # fmt: skip

# These end the run with an error. Any other that does is not the bug that it describes, but code that fails by itself.
END_THE_RUN = {
    "torch-splits-swapped", "torch-idle-rank-detached", "torch-one-rank-raises", "torch-as-many-tokens-everywhere",
}  # fmt: skip

assert all(fault.stage in STAGES for fault in FAULTS.values())
assert FAULTS.keys() >= END_THE_RUN | REPORTED.keys()

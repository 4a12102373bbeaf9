# SPDX-License-Identifier: Apache-2.0
"""Random whole steps: lengths, plan, logits, selection. `python tests/soak.py --steps 20000` on a GPU.

A step is drawn from its seed alone, so `--seed N --steps 1` repeats one. Of each, every row's selection is held against
torch.topk on the kernel's own logits, by the tie rule, all of which must be written; and `index_topk`, by a plan for another
number of CTAs, must select the same. One step in four cleans its logits; of one in four a random request's logits are held
against the FP32 reference, which is much of the time. In a fifth of the steps ties are many, or rows hard to select from.
"""

import argparse
import random
import sys
import time

import selections
import torch
from steps import TOLERANCE, Step, random_ragged_step, random_step

import vllm_mqa_sm90
from vllm_mqa_sm90 import reference
from vllm_mqa_sm90.bench.kernel.step import row_lengths

POOL_PAGES = 256  # that requests draw from: what follows a context in its last page is another request's
REFERENCE_EVERY = 4  # steps, by the seed
HARD = ("one page", "no weights", "no keys", "NaN scales", "growing scales", "shrinking scales")


def draw(seed: int, device: str, small: bool = False) -> tuple[Step, int, str]:
    """A step, k, and in what it is hard; `small`: as slow tools can bear it."""
    rng = random.Random(seed)
    longest = rng.choice([100, 3000, 3000, 70000] if small else [100, 3000, 3000, 9000, 40000, 150_000])
    requests = rng.randint(1, max(1, min(70, (24_000 if small else 100_000) // longest)))
    lengths = [max(0, rng.randint(-longest // 8, longest)) for _ in range(requests)]
    options = {
        "heads": rng.choice([16, 32, 64, 64]), "page": rng.choice([32, 64, 64]), "num_pages": POOL_PAGES,
        "gap": rng.choice([0, 16 * 33]), "device": device, "seed": seed,
    }  # fmt: skip
    if rng.random() < 0.5:
        step = random_step(row_lengths(lengths, [rng.randint(1, 8)] * requests), **options)
    else:
        rows = row_lengths(lengths, [rng.randint(0, 9) for _ in lengths])
        by = rng.choice(["indices", "query_start_loc"])
        step = random_ragged_step(rows, by=by, max_rows=rng.randint(1, 8), padding=rng.randint(0, 5), **options)
    k = rng.choice([2048, 2048, 512, 1024, rng.randint(1, 2048), rng.randint(1, min(longest, 2048))])
    hard = rng.choice(HARD) if rng.random() < 0.2 else ""
    harden(step, hard)
    return step, k, hard


def harden(step: Step, how: str) -> None:
    """Changes a step in place."""
    page = step.kv_cache.shape[1]
    content = step.kv_cache.flatten(1)
    scales = content[:, page * 128 :].contiguous().view(torch.float32)
    if how == "one page":
        step.block_table.fill_(3)
    elif how == "no weights":
        step.weights.zero_()
    elif how == "no keys":
        content[::2, : page * 128] = 0
    elif how == "NaN scales":
        scales[::3, ::5] = torch.nan
    elif how in ("growing scales", "shrinking scales"):
        line = torch.arange(1, scales.numel() + 1, device=scales.device).view(scales.shape).float()
        scales.copy_(line if how == "growing scales" else 1e6 / line)
    content[:, page * 128 :] = scales.view(torch.uint8)


def workspace(step: Step, fill: bool) -> torch.Tensor:
    """Logits `[T, max_context_len]` to write to, NaN if filled; but rows of no request, which have none, are 0.

    Such rows, which a query_start_loc tells, may have a length, and are selected from.
    """
    rows, columns = step.context_lens.numel(), step.max_context_len
    logits = torch.empty(rows, -(-columns // 64) * 64, device=step.q.device)[:, :columns]
    if fill:
        logits.fill_(torch.nan)
    if step.query_start_loc is not None:
        logits[int(step.query_start_loc[-1]) :] = 0
    return logits


def has_request(step: Step) -> torch.Tensor:
    """Of each row of a step by query_start_loc."""
    return torch.arange(step.context_lens.numel(), device=step.q.device) < step.query_start_loc[-1]


def lens_by_request(step: Step) -> torch.Tensor:
    """What `row_context_lens` makes of a step by query_start_loc, of requests as long as their last row."""
    starts, ends = step.query_start_loc[:-1], step.query_start_loc[1:]
    last_rows = step.context_lens[(ends.long() - 1).clamp(min=0)]
    return vllm_mqa_sm90.row_context_lens(
        last_rows.where(ends > starts, 0), step.query_start_loc, out=torch.empty_like(step.context_lens)
    )


def check(
    seed: int, num_sms: int | None = None, device: str = "cuda", small: bool = False, compare: bool = True
) -> str | None:
    """What is wrong with the step of that seed; None: nothing. Without `compare` it only runs, on logits never filled."""
    step, k, hard = draw(seed, device, small)
    rng = random.Random(~seed)
    what = f"{hard or 'as drawn'}, k {k}, lengths {list(step.context_lens.shape)}"
    columns, lens, clean = step.max_context_len, step.context_lens, rng.random() < 0.25
    logits = step.logits(step.plan(num_sms=num_sms), out=workspace(step, compare), clean_logits=clean)
    indices = vllm_mqa_sm90.topk_indices(logits, lens, k)
    plan = step.plan(k=k, num_sms=rng.randint(1, 132))
    options = {"max_context_len": columns, "max_rows": step.max_rows, "logits": workspace(step, compare)}
    whole = vllm_mqa_sm90.index_topk(*step.inputs(), plan, k, **options)
    row_lens = lens_by_request(step) if step.query_start_loc is not None and lens.numel() else None
    if not compare:
        return None
    if not torch.equal(indices, selections.expected(logits, lens, k)):
        return f"{what}: the selection is wrong"
    if not torch.equal(whole, indices):
        return f"{what}: index_topk selects otherwise"
    if row_lens is not None and not torch.equal(row_lens, lens.where(has_request(step), 0)):
        return f"{what}: row_context_lens has other lengths"
    within = torch.arange(columns, device=logits.device) < lens.reshape(-1, 1)
    if clean and not bool((logits.masked_fill(within, -torch.inf) == -torch.inf).all()):
        return f"{what}: clean_logits left a column"
    if hard == "NaN scales":
        return None
    if bool((logits.isnan() & within).any()):
        return f"{what}: a logit is not written"
    return None if seed % REFERENCE_EVERY or not lens.numel() else wrong_logits(step, logits, rng, what)


def wrong_logits(step: Step, logits: torch.Tensor, rng: random.Random, what: str) -> str | None:
    first, end, request = rng.choice(reference.groups_of(step.context_lens, **step.grouping()) or [(0, 0, 0)])
    lens = step.context_lens.view(-1)[first:end]
    if first == end or int(lens.max()) <= 0:
        return None
    part = slice(first, end)
    inputs = step.q.flatten(0, -3)[part], step.kv_cache, step.weights[part], lens, step.block_table[request].expand(end - first, -1)
    expected = reference.paged_mqa_logits(*inputs, max_context_len=step.max_context_len)
    valid = expected > -torch.inf
    given, expected = logits[part][valid].double(), expected[valid].double()
    error = float((given - expected).norm())
    if error <= TOLERANCE * float(expected.norm()):
        return None
    # Signed weights cancel: what counts for few is the sum of magnitudes, which is about this, and more.
    magnitudes = reference.paged_mqa_logits(inputs[0], inputs[1], inputs[2].abs(), *inputs[3:], max_context_len=step.max_context_len)
    scale = magnitudes[valid].double().abs().norm()
    error = error / float(scale) if float(scale) else error
    return None if error <= TOLERANCE else f"{what}: logits of rows {first} to {end} are {error:.1e} off"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first step; the others follow")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no step later")
    parser.add_argument("--small", action="store_true", help="smaller steps, for compute-sanitizer; others than without")
    parser.add_argument("--run-only", action="store_true", help="compare nothing, and fill no logits before, for its initcheck")
    parser.add_argument("--verbose", action="store_true", help="name each seed before its step")
    args = parser.parse_args()
    start, steps, wrong = time.monotonic(), 0, 0
    for seed in range(args.seed, args.seed + args.steps):
        if time.monotonic() - start > args.seconds:
            break
        if args.verbose:
            print(f"--seed {seed}", flush=True)
        steps += 1
        if (problem := check(seed, small=args.small, compare=not args.run_only)) is not None:
            wrong += 1
            print(f"--seed {seed}: {problem}", flush=True)
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    print(f"{steps} steps from seed {args.seed}, {wrong} wrong, {seconds:.0f} s, {torch.cuda.get_device_name()}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

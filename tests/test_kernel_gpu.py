# SPDX-License-Identifier: Apache-2.0
"""The kernel on a GPU, against the FP32 oracle and against itself."""

import itertools

import pytest
import torch
from steps import POISON, TILE, Step, assert_accurate, poisoned, random_pages, random_ragged_step, random_step
from test_reference import assert_special_values, special_values_step

import vllm_mqa_sm90

pytestmark = pytest.mark.gpu

EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000, 4095, 4096, 4097]


def rows_of(lengths: list[int], next_n: int) -> list[list[int]]:
    """Groups as decode has them: a request's rows see one token more each."""
    return [[length - next_n + 1 + row if length else 0 for row in range(next_n)] for length in lengths]


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("heads", [16, 32, 64])
@pytest.mark.parametrize("next_n", range(1, 9))
def test_accuracy(next_n: int, heads: int, page: int) -> None:
    """Every variant: edge lengths, padding rows, shuffled pages with gaps, stale ids, NaN past contexts."""
    lengths = [*EDGES, -3, 20000]
    step = random_step(rows_of(lengths, next_n), heads=heads, page=page, gap=16 * 33, device="cuda")
    assert_accurate(step.run(out=poisoned(step)), step)


@pytest.mark.parametrize("next_n", range(1, 9))
def test_rows_of_one_group_with_unrelated_lengths(next_n: int) -> None:
    pool = [0, 700, 1, -1, 64, 65, 3000, 2]
    lens = [list(rows) for rows in itertools.islice(itertools.product(pool, repeat=next_n), 600)]
    step = random_step(lens, num_pages=200, device="cuda")
    assert_accurate(step.run(out=poisoned(step)), step)


@pytest.mark.parametrize("next_n", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 131, 132, 133, 256, 1024, 4096])
def test_batches(batch: int, next_n: int) -> None:
    torch.manual_seed(batch)
    lengths = torch.randint(0, 1500, (batch,)).tolist()
    step = random_step(rows_of(lengths, next_n), num_pages=2000, device="cuda")
    assert_accurate(step.run(out=poisoned(step)), step)


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("next_n", range(1, 9))
def test_long_contexts(next_n: int, page: int) -> None:
    step = random_step(rows_of([131072, 5, 131071, 65536], next_n), page=page, device="cuda")
    assert_accurate(step.run(out=poisoned(step)), step)


def test_cache_past_4_gib() -> None:
    """Page offsets and output offsets that do not fit in 32 bits."""
    pages, stride = 9, 1 << 29
    storage = torch.empty((pages - 1) * stride + 64 * 132, dtype=torch.uint8, device="cuda")
    step = random_step(rows_of([pages * 64], 3), device="cuda")
    far = storage.as_strided((pages, 64, 1, 132), (stride, 132, 132, 1))
    far.copy_(random_pages(pages, 64, device="cuda"))
    step.kv_cache = far
    step.block_table[0, :pages] = torch.arange(pages - 1, -1, -1, device="cuda")
    rows_apart = (1 << 30) + 64
    out = torch.empty(2 * rows_apart + step.max_context_len, device="cuda")
    out = out.as_strided((3, step.max_context_len), (rows_apart, 1)).fill_(POISON)
    assert_accurate(step.run(out=out), step)


def test_block_table_with_row_stride_and_spare_rows() -> None:
    step = random_step(rows_of([300, 65, 1], 2), device="cuda")
    wide = torch.full((5, 40), -1, dtype=torch.int32, device="cuda")
    wide[:3, : step.block_table.shape[1]] = step.block_table
    step.block_table = wide[:, :30]
    assert_accurate(step.run(out=poisoned(step)), step)


def test_max_context_len_cuts_rows() -> None:
    step = random_step(rows_of([300, 100], 3), device="cuda")
    step.max_context_len = 130
    storage = torch.full((6, 192), POISON, device="cuda")
    assert_accurate(step.run(out=storage[:, :130]), step)
    assert storage[:, 130:].isnan().all()


@pytest.mark.parametrize("next_n", range(1, 9))
def test_nothing_outside_the_rows_tiles_is_written(next_n: int) -> None:
    step = random_step(rows_of([*EDGES, -7], next_n), num_pages=100, device="cuda")
    rows, columns = step.context_lens.numel(), step.max_context_len
    guard = 512
    storage = torch.full((rows + 2, columns + guard), POISON, device="cuda")
    step.run(out=storage[1:-1, :columns])
    tiles_end = -(-step.context_lens.view(-1, 1).clamp(min=0) // TILE) * TILE
    outside = torch.arange(columns + guard, device="cuda") >= tiles_end
    assert storage[1:-1][outside].isnan().all()
    assert storage[0].isnan().all() and storage[-1].isnan().all()


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("least", [-(2**31), 1 - 2**31, 64 - 2**31, -1])
def test_any_negative_length_is_a_padding_row(least: int, heads: int) -> None:
    """First, between and last in a group whose other rows have tiles: -2^31 less a position would be a long row."""
    lens = [[least, 64, 300], [300, least, 64], [64, 300, least], [least, least, 9000], [least] * 3]
    step = random_step(lens, heads=heads, num_pages=200, device="cuda")
    rows, columns = step.context_lens.numel(), step.max_context_len
    storage = torch.full((rows + 2, columns), POISON, device="cuda")
    assert_accurate(step.run(out=storage[1:-1]), step)
    tiles_end = -(-step.context_lens.view(-1, 1).clamp(min=0) // TILE) * TILE
    outside = torch.arange(columns, device="cuda") >= tiles_end
    assert storage[1:-1][outside].isnan().all()
    assert storage[0].isnan().all() and storage[-1].isnan().all()


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("next_n", [1, 3, 6])
def test_ids_of_no_page_within_a_context_read_as_zeros(next_n: int, page: int) -> None:
    """Neither a fault nor another page's logits: keys of zeros."""
    step = random_step(rows_of([1000, 700, 64], next_n), heads=32, page=page, device="cuda")
    expected = step.reference()
    bad = torch.zeros(3, step.block_table.shape[1], dtype=torch.bool, device="cuda")
    for column, page_id in enumerate([-1, len(step.kv_cache), 2**31 - 1, -(2**31), 1 << 20]):
        step.block_table[0, 3 * column], bad[0, 3 * column] = page_id, True
    logits = step.run(out=poisoned(step))
    torch.cuda.synchronize()
    of_bad = bad.repeat_interleave(page, dim=1)[:, : step.max_context_len].repeat_interleave(next_n, dim=0)
    valid = expected > -torch.inf
    assert (logits[valid & of_bad] == 0).all() and of_bad[:next_n].sum() > 5
    torch.testing.assert_close(logits[valid & ~of_bad], expected[valid & ~of_bad], rtol=1e-3, atol=0.5)


def test_nan_and_zero() -> None:
    step = special_values_step("cuda")
    assert_special_values(step.run(), step)


def test_inputs_are_left_alone() -> None:
    """The plan too, though a launch counts in it the spare shares that it has handed out."""
    step = random_step(rows_of([*EDGES, 8192], 3), device="cuda")
    plan = step.plan(num_sms=3)
    assert plan[0, 1] > 0
    tensors = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (*step.inputs(), plan)]
    before = [t.clone() for t in tensors]
    for _ in range(3):
        step.logits(plan)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_a_rows_bits_depend_on_the_row_alone(heads: int) -> None:
    """The same rows, grouped by 1 to 6, alone or in a crowd, over few or many SMs."""
    requests = 5
    lens = [[1 + 997 * request + 64 * row for row in range(12)] for request in range(requests)]
    whole = random_step([[max(rows)] for rows in lens], heads=heads, device="cuda")
    q = torch.randn(requests * 12, heads, 128, device="cuda").to(torch.float8_e4m3fn)
    weights = torch.randn(requests * 12, heads, device="cuda")

    def bits(next_n: int, num_sms: int | None, keep: int = requests) -> torch.Tensor:
        groups = keep * 12 // next_n
        step = Step(
            q=q[: keep * 12].view(groups, next_n, heads, 128),
            kv_cache=whole.kv_cache,
            weights=weights[: keep * 12],
            context_lens=torch.tensor(lens[:keep], dtype=torch.int32, device="cuda").view(groups, next_n),
            block_table=whole.block_table[:keep].repeat_interleave(12 // next_n, dim=0),
            max_context_len=whole.max_context_len,
        )
        return step.run(num_sms=num_sms, clean_logits=True)

    expected = bits(1, None)
    for next_n in 1, 2, 3, 4, 6:
        for num_sms in None, 1, 2, 77, 1000:
            assert torch.equal(bits(next_n, num_sms), expected), (next_n, num_sms)
        for keep in range(1, requests):
            assert torch.equal(bits(next_n, None, keep), expected[: keep * 12]), (next_n, keep)


@pytest.mark.parametrize("heads", [16, 32, 64])
@pytest.mark.parametrize("next_n", [5, 6, 7, 8])
def test_rows_of_wide_groups_have_the_bits_of_rows_alone(next_n: int, heads: int) -> None:
    step = random_step(rows_of([*EDGES, 20000], next_n), heads=heads, device="cuda")
    alone = Step(
        q=step.q.flatten(0, 1),
        kv_cache=step.kv_cache,
        weights=step.weights,
        context_lens=step.context_lens.flatten(),
        block_table=step.block_table.repeat_interleave(next_n, dim=0),
        max_context_len=step.max_context_len,
    )
    expected = alone.run(clean_logits=True)
    for num_sms in None, 1, 77:
        assert torch.equal(step.run(num_sms=num_sms, clean_logits=True), expected), num_sms


@pytest.mark.parametrize("next_n", range(1, 9))
def test_graph_replay_with_changing_lengths(next_n: int) -> None:
    """One capture of plan and logits; lengths, pages, queries and counts change between replays."""
    batch, longest = 16, 3000
    step = random_step(rows_of([longest] * batch, next_n), num_pages=500, device="cuda")
    plan = torch.empty(vllm_mqa_sm90.plan_shape(132), dtype=torch.int32, device="cuda")
    out = poisoned(step)

    def run() -> None:
        step.plan(out=plan)
        step.logits(plan, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    before = vllm_mqa_sm90.launch_counts()
    for high in 1, 64, 65, 500, longest, longest:
        lengths = torch.randint(0, high + 1, (batch,)).tolist()
        step.take(random_step(rows_of(lengths, next_n), num_pages=500, device="cuda", seed=high))
        out.fill_(POISON)
        graph.replay()
        assert_accurate(out, step)
    torch.cuda.synchronize()
    after = vllm_mqa_sm90.launch_counts()
    assert after == {n: before[n] + (6 if n == next_n else 0) for n in before}


@pytest.mark.parametrize(("next_n", "max_rows"), [(1, None), (3, None), (6, None), (3, 3), (5, 2)], ids=str)
def test_waits_for_what_the_kernel_before_writes(next_n: int, max_rows: int | None) -> None:
    """That kernel lets ours start, idles, and only then writes queries, weights and keys. With `max_rows` a ragged step."""
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.language.extra import cuda

    @triton.jit
    def late_copies(q, q_late, weights, weights_late, keys, keys_late, sizes, BLOCK: tl.constexpr):
        cuda.gdc_launch_dependents()
        start = cuda.globaltimer()
        while cuda.globaltimer() < start + 200_000:
            pass
        for i in tl.static_range(3):
            to, late = (q, q_late) if i == 0 else (weights, weights_late) if i == 1 else (keys, keys_late)
            size = tl.load(sizes + i)
            for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
                offsets = first + tl.arange(0, BLOCK)
                tl.store(to + offsets, tl.load(late + offsets, offsets < size), offsets < size)

    lengths = [1, 64, 65, 1000] * 20
    if max_rows is None:
        step = random_step(rows_of(lengths, next_n), device="cuda")
    else:
        step = random_ragged_step(
            rows_of(lengths, next_n), by="query_start_loc", max_rows=max_rows, padding=3, device="cuda"
        )
    plan = step.plan()
    late = step.q.clone(), step.weights.clone(), step.kv_cache.clone()
    buffers = [
        b.view(torch.uint8).view(-1)
        for now, then in zip((step.q, step.weights, step.kv_cache), late, strict=True)
        for b in (now, then)
    ]
    sizes = torch.tensor([b.numel() for b in buffers[::2]], dtype=torch.int64, device="cuda")
    out = poisoned(step)
    for _ in range(3):
        for written_late in step.q.view(torch.uint8), step.weights, step.kv_cache:
            written_late.zero_()
        out.fill_(POISON)
        torch.cuda.synchronize()
        late_copies[(32,)](*buffers, sizes, BLOCK=1024)
        step.logits(plan, out=out)
        assert_accurate(out, step)


def test_overlapping_launches_change_no_bit() -> None:
    """Launches that overlap, in a row and in a graph, with spare shares counted in one plan."""
    step = random_step(rows_of([*EDGES, 9000] * 20, 3), num_pages=500, device="cuda")
    plan = step.plan(num_sms=40)
    assert plan[0, 1] > 0
    expected = step.run(clean_logits=True)
    outs = [poisoned(step) for _ in range(4)]

    def run() -> None:
        for out in outs:
            step.logits(plan, out=out)

    torch.cuda.synchronize()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    valid = expected > -torch.inf
    assert all(torch.equal(out[valid], expected[valid]) for out in outs)


def test_a_plan_serves_many_layers() -> None:
    step = random_step(rows_of(EDGES, 3), device="cuda")
    plan = step.plan()
    for _ in range(3):
        step.q = torch.randn(step.q.shape, device="cuda").to(torch.float8_e4m3fn)
        out = poisoned(step)
        step.logits(plan, out=out)
        assert_accurate(out, step)


def test_current_stream_is_used() -> None:
    """Work that another stream must wait for comes first on the stream that is current."""
    step = random_step(rows_of([4096] * 64, 3), num_pages=500, device="cuda")
    expected = step.run(clean_logits=True)
    lens = step.context_lens.clone()
    step.context_lens.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        step.context_lens.copy_(lens)
        given = step.run(clean_logits=True)
    torch.cuda.synchronize()
    assert torch.equal(given, expected)


def test_repeated_runs_are_identical() -> None:
    step = random_step(rows_of([2000] * 100 + EDGES, 3), num_pages=500, device="cuda")
    expected = step.run(clean_logits=True)
    assert all(torch.equal(step.run(clean_logits=True), expected) for _ in range(200))


def test_clean_logits_and_allocated_output() -> None:
    step = random_step(rows_of([130, 0, 65], 3), device="cuda")
    out = step.run(clean_logits=True)
    assert out.shape == (9, 130) and out.stride() == (192, 1)
    assert torch.equal(out == -torch.inf, step.reference() == -torch.inf)


def test_clean_logits_goes_by_the_block_table_too() -> None:
    step = random_step(rows_of([300, 65, 0], 2), device="cuda")
    step.block_table = step.block_table[:, :2]
    step.max_context_len = 5000
    storage = torch.full((6, 6000), POISON, device="cuda")
    out = step.run(out=storage[:, :5000], clean_logits=True)
    seen = step.context_lens.view(-1, 1).clamp(max=2 * 64)
    assert torch.equal(out == -torch.inf, torch.arange(5000, device="cuda") >= seen) and not out.isnan().any()
    assert storage[:, 5000:].isnan().all()


def test_clean_logits_takes_no_memory() -> None:
    step = random_step([[1, 100000]] * 8, num_pages=100, device="cuda")
    plan, out = step.plan(), poisoned(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.logits(plan, out=out, clean_logits=True)
    assert torch.cuda.max_memory_allocated() == before
    assert torch.equal((out > -torch.inf).sum(dim=1), step.context_lens.view(-1))


def test_empty_steps_are_no_ops() -> None:
    before = vllm_mqa_sm90.launch_counts()
    step = random_step([[100, 101]], device="cuda")
    step.q, step.weights, step.context_lens = step.q[:0], step.weights[:0], step.context_lens[:0]
    assert step.run().shape == (0, 101)
    step = random_step([[100, 101]], device="cuda")
    step.max_context_len = 0
    assert step.run().shape == (2, 0)
    torch.cuda.synchronize()
    assert vllm_mqa_sm90.launch_counts() == before


@pytest.mark.parametrize("page", [32, 64])
def test_padded_plans_serve_launches_of_more_rows(page: int) -> None:
    """As a CUDA graph that was captured for more: the rows past the plan's are padding, whatever their lengths."""
    step = random_step(rows_of([900, 300, 65, 2000, 700], 3), page=page, device="cuda")
    plan = vllm_mqa_sm90.plan(step.context_lens[:3], padded=True)
    out = step.logits(plan, out=poisoned(step))
    expected = step.run(clean_logits=True)
    valid = expected[:9] > -torch.inf
    assert torch.equal(out[:9][valid], expected[:9][valid]) and out[9:].isnan().all()
    cleaned = step.logits(plan, out=poisoned(step), clean_logits=True)
    assert torch.equal(cleaned[:9], expected[:9]) and (cleaned[9:] == -torch.inf).all()

    none = vllm_mqa_sm90.plan(torch.zeros(0, 1, dtype=torch.int32, device="cuda"), padded=True)
    assert step.logits(none, out=poisoned(step)).isnan().all()


def test_steps_of_padding_rows_write_nothing() -> None:
    step = random_step([[0, -1], [-(2**31), 0]], device="cuda")
    step.max_context_len = 200
    assert step.run(out=poisoned(step)).isnan().all()


def test_compile() -> None:
    step = random_step(rows_of([500, 64, 1], 3), device="cuda")

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        plan = vllm_mqa_sm90.plan(inputs[3])
        return vllm_mqa_sm90.paged_mqa_logits(*inputs, plan, max_context_len=500, clean_logits=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*step.inputs()), call(*step.inputs()))

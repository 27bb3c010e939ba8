"""mosaic.layout against plain indexing of range(n)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic.api.errors import ShardingError
from mosaic.layout import Interval, Layout, Place, Run, Shard, common, exchange

sizes = st.integers(0, 40)
worlds = st.integers(1, 5)


@st.composite
def partitions(draw: st.DrawFn, n: int | None = None, p: int | None = None) -> Layout:
    """Every index on one rank; several intervals per rank in any order, ranks may be empty."""
    n = draw(sizes) if n is None else n
    p = draw(worlds) if p is None else p
    cuts = sorted(draw(st.sets(st.integers(0, n), max_size=8)) | {0, n})
    ranks: list[list[tuple[int, int]]] = [[] for _ in range(p)]
    for interval in draw(st.permutations(list(pairwise(cuts)))):
        ranks[draw(st.integers(0, p - 1))].append(interval)
    return Layout.of(n, ranks)


@st.composite
def subsets(draw: st.DrawFn, n: int, p: int) -> Layout:
    """A layout that may leave indices out, or hold them on several ranks."""
    return Layout(n, tuple(draw(partitions(n, 2)).ranks[0] for _ in range(p)))


@st.composite
def two_partitions(draw: st.DrawFn) -> tuple[Layout, Layout]:
    n, p = draw(sizes), draw(worlds)
    return draw(partitions(n, p)), draw(partitions(n, p))


@st.composite
def slices(draw: st.DrawFn) -> tuple[Layout, range]:
    layout = draw(partitions())
    start = draw(st.integers(0, layout.n))
    stop = draw(st.integers(start, layout.n))
    return layout, range(start, stop, draw(st.integers(1, 4)))


def shards(layout: Layout) -> list[list[int]]:
    return [layout.indices(rank) for rank in range(layout.p)]


def read(memory: list[int], runs: tuple[Run, ...]) -> list[int]:
    return [memory[i] for run in runs for i in range(*run)]


# --- making one --------------------------------------------------------------------------------


@given(sizes, worlds)
def test_even_is_the_cut_of_chunk(n, p):
    chunks = [c.tolist() for c in torch.arange(n).chunk(p)]
    assert shards(Layout.even(n, p)) == chunks + [[]] * (p - len(chunks))


@given(sizes, worlds, st.integers(1, 7))
def test_even_in_units(n, p, k):
    layout = Layout.even(n, p, multiple_of=k)
    assert layout.is_partition
    assert [i for shard in shards(layout) for i in shard] == list(range(n))
    assert all(start % k == 0 for rank in layout.ranks for start, _ in rank)
    units = [-(-length // k) for length in layout.lengths]
    assert units == [len(u) for u in shards(Layout.even(-(-n // k), p))]


@given(sizes, worlds, st.integers(1, 4))
def test_zigzag_pairs_an_early_chunk_with_a_late_one(n, p, k):
    chunks = shards(Layout.even(n, 2 * p, k))
    layout = Layout.zigzag(n, p, k)
    assert shards(layout) == [chunks[r] + chunks[2 * p - 1 - r] for r in range(p)]
    assert layout.is_partition


@given(sizes, worlds, st.integers(1, 5), st.integers(1, 9))
def test_many_zigzags(n, p, chunk, most):
    layout = Layout.zigzags(n, p, chunk, most)
    assert layout.is_partition
    times = max(1, min(most, n // (2 * p * chunk)))
    every = shards(Layout.even(n, 2 * p * times))
    starts = range(0, len(every), 2 * p)
    for rank, shard in enumerate(shards(layout)):
        chunks = [every[a + i] for a in starts for i in (rank, 2 * p - 1 - rank)]
        assert shard == [i for chunk in chunks for i in chunk]


@given(sizes, worlds)
def test_whole(n, p):
    layout = Layout.whole(n, p)
    assert shards(layout) == [list(range(n))] * p
    assert layout.is_partition == (p == 1 or n == 0)


@given(partitions())
def test_str_and_parse(layout):
    assert Layout.parse(str(layout)) == layout


REGULAR = [
    Layout.even(8195, 1024),
    Layout.zigzag(8195, 1024),
    Layout.zigzag(8195, 1024).slice(1, 8000),
    Layout.zigzag(4096, 1024).reversed,
    Layout.even(100, 1024),
    Layout.whole(100, 1024),
]


@pytest.mark.parametrize("layout", REGULAR, ids=str)
def test_the_text_of_many_ranks_is_short(layout):
    assert Layout.parse(str(layout)) == layout
    assert len(str(layout)) < 100


@pytest.mark.parametrize("text", ["4=0:2|2:x", "4=0:2+,2:4", "4=0-2|2:4"])
def test_another_text_is_no_layout(text):
    with pytest.raises(ShardingError):
        Layout.parse(text)


@given(st.data(), sizes)
def test_text_with_evenly_spaced_ranks(data, n):
    """Eight and more ranks alike, between others that are not."""
    before, after = data.draw(partitions(n)), data.draw(partitions(n))
    spaced = Layout.zigzag(n, 9) if data.draw(st.booleans()) else Layout.even(n, 12)
    layout = Layout(n, (*before.ranks, *spaced.ranks, *after.ranks))
    assert Layout.parse(str(layout)) == layout


@given(partitions())
def test_the_form_is_normal(layout):
    singles = Layout.of(layout.n, ([(i, i + 1) for i in shard] for shard in shards(layout)))
    assert singles == layout and hash(singles) == hash(layout)


# --- reading it --------------------------------------------------------------------------------


@given(partitions())
def test_lengths_and_indices(layout):
    assert layout.lengths == tuple(len(shard) for shard in shards(layout))
    assert sorted(i for shard in shards(layout) for i in shard) == list(range(layout.n))
    assert layout.is_partition


@given(st.data(), sizes, worlds)
def test_is_partition(data, n, p):
    layout = data.draw(subsets(n, p))
    held = sorted(i for shard in shards(layout) for i in shard)
    assert layout.is_partition == (held == list(range(n)))


# --- the algebra -------------------------------------------------------------------------------


@given(slices())
def test_slice(case):
    layout, kept = case
    sliced = layout.slice(kept.start, kept.stop, kept.step)
    assert sliced.n == len(kept)
    assert shards(sliced) == [[kept.index(i) for i in s if i in kept] for s in shards(layout)]


@given(slices())
def test_runs_read_the_slice_out_of_memory(case):
    layout, kept = case
    for rank, memory in enumerate(shards(layout)):
        runs = layout.runs(rank, kept.start, kept.stop, kept.step)
        assert read(memory, runs) == [i for i in memory if i in kept]


@given(partitions(), st.integers(0, 5), st.integers(0, 5))
def test_embed(layout, before, after):
    longer = layout.embed(before, before + layout.n + after)
    assert shards(longer) == [[i + before for i in shard] for shard in shards(layout)]
    assert longer.slice(before, before + layout.n) == layout


@given(st.data(), worlds, st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_concat(data, p, lengths):
    parts = [data.draw(partitions(n, p)) for n in lengths]
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    whole = Layout.concat(parts)
    assert whole.n == sum(lengths) and whole.is_partition
    for rank in range(p):
        pairs = zip(starts, parts, strict=True)
        assert whole.indices(rank) == [i + o for o, part in pairs for i in part.indices(rank)]


@given(partitions(), st.integers(1, 4))
def test_scale_and_coarsen(layout, k):
    scaled = layout.scale(k)
    wide = [[i * k + j for i in shard for j in range(k)] for shard in shards(layout)]
    assert scaled.n == layout.n * k and shards(scaled) == wide
    assert scaled.coarsen(k) == layout


@given(partitions(), st.integers(1, 4))
def test_coarsen_keeps_groups_or_gives_none(layout, k):
    coarse = layout.coarsen(k)
    if coarse is not None:
        assert coarse.scale(k) == layout
    else:
        edges = {edge for rank in layout.ranks for interval in rank for edge in interval}
        assert layout.n % k or any(edge % k for edge in edges)


@given(st.data(), sizes, worlds)
def test_common(data, n, p):
    held, wanted = data.draw(partitions(n, p)), data.draw(partitions(n, p))
    for rank in range(p):
        ascending = tuple(sorted(wanted.ranks[rank]))
        found = Layout(n, (common(held.ranks[rank], ascending),))
        mine = set(wanted.indices(rank))
        assert found.indices(0) == [i for i in held.indices(rank) if i in mine]


@given(st.data(), sizes, worlds)
def test_holders(data, n, p):
    layout = data.draw(subsets(n, p) | st.just(Layout.whole(n, p)))
    wanted = data.draw(subsets(n, 1))
    mine = set(wanted.indices(0))
    assert layout.holders(wanted.ranks[0]) == {
        rank for rank, memory in enumerate(shards(layout)) if mine & set(memory)
    }


@given(st.data(), sizes, worlds)
def test_is_within(data, n, p):
    part, layout = data.draw(subsets(n, p)), data.draw(partitions(n, p))
    pairs = zip(shards(part), shards(layout), strict=True)
    assert part.is_within(layout) == all(set(mine) <= set(held) for mine, held in pairs)
    assert layout.is_within(layout) and layout.is_within(Layout.whole(n, p))


@given(partitions())
def test_gather_order(layout):
    memory = shards(layout)
    order = layout.gather_order()
    assert [i for rank, run in order for i in read(memory[rank], (run,))] == list(range(layout.n))


# --- moving ------------------------------------------------------------------------------------


def all_to_all(source: Layout, target: Layout) -> list[list[int]]:
    """What every rank holds after the exchange, with lists for tensors."""
    plans = [exchange(source, target, rank) for rank in range(source.p)]
    sent: list[list[list[int]]] = []
    for memory, plan in zip(shards(source), plans, strict=True):
        buffer = read(memory, plan.take)
        assert len(buffer) == sum(plan.send)
        edges = [sum(plan.send[:peer]) for peer in range(source.p + 1)]
        sent.append([buffer[a:b] for a, b in pairwise(edges)])
    out = []
    for rank, plan in enumerate(plans):
        arrived = [sent[peer][rank] for peer in range(source.p)]
        assert tuple(len(part) for part in arrived) == plan.receive
        out.append(read([i for part in arrived for i in part], plan.place))
    return out


@given(two_partitions())
@settings(max_examples=300)
def test_exchange(layouts):
    source, target = layouts
    assert all_to_all(source, target) == shards(target)


@given(partitions())
def test_exchange_with_itself_stays_at_home(layout):
    for rank in range(layout.p):
        plan = exchange(layout, layout, rank)
        home = tuple(layout.lengths[rank] if peer == rank else 0 for peer in range(layout.p))
        assert plan.send == plan.receive == home


@pytest.mark.parametrize("n", [0, 1, 7, 16, 37])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_exchange_between_the_usual_cuts(n, p):
    even, zigzag = Layout.even(n, p), Layout.zigzag(n, p)
    assert all_to_all(even, zigzag) == shards(zigzag)
    assert all_to_all(zigzag, even) == shards(even)


# --- places ------------------------------------------------------------------------------------

places = st.builds(Place, partitions(), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))


@given(places, st.integers(0, 4), st.sampled_from(["", "12", "mesh_sp"]))
def test_shard_is_read_back(place, rank, group):
    shard = Shard(place, rank, group)
    assert Shard.decode(shard.encode()) == shard


@given(places)
def test_local_sizes_add_up(place):
    sizes = [place.local_size(rank) for rank in range(place.layout.p)]
    assert sum(sizes) == place.size
    shape = [2, 3, 5, 7]
    shape[place.dim] = place.size
    for rank, size in enumerate(sizes):
        assert place.local_shape(shape, rank) == [
            *shape[: place.dim],
            size,
            *shape[place.dim + 1 :],
        ]


@given(places)
def test_refined_is_the_same_memory(place):
    refined = place.refined()
    assert refined.size == place.size
    for rank in range(place.layout.p):
        assert refined.local_size(rank) == place.local_size(rank)
    assert refined.inner == 1 or place.outer != 1


def test_the_printed_form():
    place = Place(Layout.even(9, 4), dim=1, outer=2)
    assert str(place) == "9=0:3|3:6|6:9| dim=1 outer=2 inner=1"
    assert Layout.even(9, 4).ranks[0] == (Interval(0, 3),)


def test_one_row_for_all_is_never_made() -> None:
    """It would fit into any dim: 20 elements on a single rank are not 1 row of 20."""
    alone = Place(Layout.whole(20, 1), 2)
    assert alone.coarsened() == alone
    assert Place(Layout.even(20, 2), 2).coarsened().layout.n == 2

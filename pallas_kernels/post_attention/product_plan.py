"""How the CTAs of one product share it: integers, before anything runs.

A product ``[M, K] x [K, num_parts * N]`` is cut into tiles of 64 columns of each part. A tile's depth K is cut into
slices, which a CTA streams one after the other; where there are few tiles, a cluster of ``split`` CTAs shares a tile,
each with an equal run of its slices.
"""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.post_attention.plan import COLUMNS, ITEM_ROWS, Shape

SLICE = 128  # rows of the weight that are copied and multiplied at once
MAX_ROWS = 64
_MAX_SPLIT = 8  # a cluster of more CTAs isn't portable
# Below so many CTAs a product waits for single multiprocessors. So many are better still, where all of them run at once
# and each reads long enough to make up for the cluster: 1 to 2 us.
_MIN_CTAS, _GOOD_CTAS = 48, 96
_DEEP = 2048  # rows of the weight
# Shared memory of a multiprocessor is 228 KB, less 1 KB for each CTA. Two CTAs with few rows share one: while one
# starts or ends, the other reads.
_SMEM_OF_TWO, _SMEM_OF_ONE = 112 << 10, 226 << 10
_ROWS_OF_TWO = 16
# Of the next product's weight, that are asked for when a CTA's last slice is: memory would be idle until that launch's
# own copies.
_AHEAD_BYTES = 2 << 20
_LINE = 128  # bytes


@dataclass(frozen=True)
class ProductPlan:
    """Of one product.

    Attributes:
        num_tiles: of 64 columns, of each part.
        num_parts: weights side by side: 2 for gate and up, whose columns are in one tile.
        split: CTAs of a cluster, which share a tile.
        num_slices: that each of them has.
        stages: slices in shared memory.
        share_rows: rows of a tile's sum that one CTA of the cluster finishes; the first ``M / share_rows`` CTAs do.
    """

    num_tiles: int
    num_parts: int
    split: int
    num_slices: int
    stages: int
    share_rows: int

    @property
    def num_ctas(self) -> int:
        return self.num_tiles * self.split


def plan_product(
    num_rows: int, depth: int, num_columns: int, num_parts: int = 1, *, multiprocessors: int
) -> ProductPlan | str:
    """The plan, or why there is none. ``num_rows``: a multiple of 8; ``num_columns``: of each part."""
    if depth % SLICE or num_columns % COLUMNS:
        return f"a product of {depth} x {num_columns}, no multiples of {SLICE} and {COLUMNS}"
    if num_rows > MAX_ROWS:
        return f"{num_rows} rows, above {MAX_ROWS}"
    num_tiles, num_slices, split = num_columns // COLUMNS, depth // SLICE, 1
    at_once = multiprocessors * (2 if num_rows <= _ROWS_OF_TWO else 1)
    while split < _MAX_SPLIT and num_slices % (2 * split) == 0:
        deep = depth >= 2 * split * _DEEP and 2 * split * num_tiles <= at_once
        if num_tiles * split >= (_GOOD_CTAS if deep else _MIN_CTAS):
            break
        split *= 2
    if num_tiles * split < _MIN_CTAS:
        return f"a product of {depth} x {num_columns} for only {num_tiles * split} CTAs"
    # Those would take as long as all before them, and leave most of the GPU idle.
    rest = num_tiles * split % at_once
    if num_tiles * split > at_once and 0 < rest < at_once / 2:
        return f"a product of {depth} x {num_columns}, {rest} of whose {num_tiles * split} CTAs would come last"
    groups = num_rows // ITEM_ROWS
    share_rows = next(n for n in range(1, groups + 1) if groups % n == 0 and groups // n <= split) * ITEM_ROWS
    # What clusters hand on, sums of squares, and the barriers of as many slices as there could be.
    used = num_parts * COLUMNS * share_rows * 4 * split * (split > 1) + 4 * share_rows * 4 + 1024
    room = (_SMEM_OF_TWO if num_rows <= _ROWS_OF_TWO else _SMEM_OF_ONE) - used
    stages = min(room // (SLICE * (num_parts * COLUMNS + num_rows) * 2), num_slices // split)
    return ProductPlan(num_tiles, num_parts, split, num_slices // split, stages, share_rows)


@dataclass(frozen=True)
class Ahead:
    """Of a product's weight, the bytes that are asked for before its launch.

    Attributes:
        rank_bytes: between the first bytes of two ranks.
        run_bytes: that each rank begins with: they stand together.
        part_bytes: of each run that one CTA asks for; the last part may be shorter, and CTAs may have none.
    """

    rank_bytes: int
    run_bytes: int
    part_bytes: int


def plan_ahead(plan: ProductPlan, num_ctas: int) -> Ahead:
    """``plan``: of the product that is asked ahead for; ``num_ctas``: of the launch that does."""
    rank_bytes = plan.num_slices * SLICE * plan.num_parts * plan.num_tiles * COLUMNS * 2
    run_bytes = min(_AHEAD_BYTES // plan.split, rank_bytes)
    return Ahead(rank_bytes, run_bytes, -(-run_bytes // num_ctas // _LINE) * _LINE)


def plan_products(shape: Shape, multiprocessors: int) -> list[ProductPlan] | str:
    """Of the output product, gate and up, down, and the next layer's qkv; or why there are none."""
    M, A, E, F, Q = shape.M, shape.A, shape.E, shape.F, shape.Q
    plans = []
    for depth, num_columns, num_parts in ((A, E, 1), (E, F, 2), (F, E, 1), (E, Q, 1)):
        plan = plan_product(M, depth, num_columns, num_parts, multiprocessors=multiprocessors)
        if isinstance(plan, str):
            return plan
        plans.append(plan)
    return plans

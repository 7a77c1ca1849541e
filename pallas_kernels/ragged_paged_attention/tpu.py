"""Ragged paged attention for TPU (v5e, v5p, v6e, 7x) in Pallas.

It was compiled ahead of time and simulated; no TPU has run it yet.

One kernel serves decode, verify and prefill. Its unit of work is a *tile*: ``BQ`` consecutive query tokens of one
row, all heads. A step makes two calls, one for the rows of at most ``BQ`` = 1 token (8 where T > R) and one for the
longer rows with larger tiles; the second writes into the output of the first. Inside a call, one program
per TensorCore walks over its tiles and, for each, over *chunks* of ``C`` keys::

    tile k:  table(k+2) -> SMEM    q(k+1) -> VMEM                     o(k) -> HBM (waited for at k+2)
    chunk j:       kv(j+1), or the first chunk of tile k+1 -> VMEM    softmax(q k^T) v on chunk j

Everything moves by explicit DMA, so memory never idles at the end of a row: the next row's first chunk is already on
its way. A block is one DMA, because a block is one contiguous piece of the pool. A row's share of the block table is
fetched per tile (4 P bytes of SMEM a row, 3 rows deep), so no table is too long for the 1 MiB of SMEM.

q and the output keep their packed shape [T, Hq, D] in HBM: a tile is ``BQ`` whole tokens, at any offset. Rows of the
matrices are ``g * BQ + t`` (head g of the group, token t), gathered in VMEM by sublane-strided float32 loads. So a
decode tile has G rows (padded to 8), not G times the padded number of tokens.

Per tile of length q at context c (Ds storage dim, e bytes an element of the pool; window: c is what it leaves):

    bytes  = 2 c Hk Ds e  (+ 8 c Hk of int8 scales)  + 4 q Hq Ds  + 4 P
    flops  = 4 c Hq Ds max(q, 8 / G)
    decode, bf16, G = 4: 4 flops a byte of KV (8 with the padding of 4 rows to 8); every generation's ridge is over
    180: bound by memory. prefill: G BQ flops a byte of KV; BQ is chosen so that G BQ is about 512, at or above the
    ridge of v5e (240), v5p (187) and 7x (312), and just under v6e's (560).

Buffering is two chunks deep. The DMA of chunk j+1 starts before the wait for chunk j, so at least one chunk is in
flight while another is computed on; that hides memory as long as a chunk lasts longer than a DMA's latency, hence
chunks of about 2 MiB: 2.6 us at v5e's 0.82 TB/s, 1.7 at v5p's 1.23 per core, 1.3 at v6e's 1.64, 0.57 at 7x's 3.7 per
core.

VMEM: 2 chunks, 4 q/o tiles, one q tile and the softmax state in float32 (``vmem_bytes``). Llama-3.1-8B (Hk 8, G 4,
D 128, bf16): decode 4.2 MiB, verify (BQ 8) 4.9, prefill (BQ 128) 18.0, of 128 MiB (v5e, v6e) and 64 MiB (v5p and 7x,
per core). The compilers report 4.3, 5.0 to 5.1 and 19.0 to 20.3 MiB: docs/tpu.md has each generation's.

Shape letters: see types.py. Ds the pool's storage dim (D padded to 128), M tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tiles import Tiles, cut_tiles
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch, Sinks

_LANES = 128
_SUBLANES = 8  # of float32
_MASKED = -1e30  # finite: a fully masked chunk must not make exp(-inf - -inf)
_CHUNK_BYTES = 2 << 20
_MAX_CHUNK = {"narrow": 1024, "wide": 512}  # keys: bounds the scores, which are float32[rows, C]
_VERIFY_TILE = 8
_TILE_ROWS = 512  # of a wide tile: G * BQ
_MAX_TILE = 128
SPARE_VMEM = 24 << 20  # for what the compiler keeps there: scores and converted K and V of a few heads
_MAX_VMEM = (64 << 20) - SPARE_VMEM  # for buffers: v5p and 7x have 64 MiB a core, v5e and v6e 128
_UNROLLED_ROWS = 64  # as many KV heads as make so many rows are unrolled: enough to overlap, little enough to compile
_TABLES = (
    3  # rows of the block table in SMEM: this tile's, the next one's (its first chunk is prefetched), one in flight
)

_DTYPES = ("bfloat16", "float32")
_KV_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")


def supports(spec: AttentionSpec) -> str | None:
    """Why the kernel refuses ``spec``, or None."""
    if spec.dtype not in _DTYPES:
        return f"dtype {spec.dtype} (it does {', '.join(_DTYPES)})"
    if spec.kv_dtype not in _KV_DTYPES:
        return f"kv_dtype {spec.kv_dtype} (it does {', '.join(_KV_DTYPES)})"
    if spec.head_dim > 256 or spec.head_dim % 16:
        return f"head_dim {spec.head_dim} (it does multiples of 16 up to 256)"
    if spec.block_size not in (32, 64, 128, 256):
        return f"block_size {spec.block_size} (it does 32, 64, 128 and 256)"
    if spec.num_heads // spec.num_kv_heads > 16:
        return f"{spec.num_heads // spec.num_kv_heads} query heads to a KV head (it does up to 16)"
    if not (_fits(spec, _VERIFY_TILE, "narrow") and _fits(spec, _SUBLANES, "wide")):
        return (
            f"{spec.num_kv_heads} KV heads of {spec.head_dim} in {spec.kv_dtype} with block_size {spec.block_size}: "
            f"the buffers don't fit into {_MAX_VMEM >> 20} MiB of VMEM"
        )
    return None


def kv_layout(spec: AttentionSpec) -> KVLayout:
    """Heads are padded to whole lanes: with any other last dimension, XLA copies the whole pool on every call."""
    return KVLayout(storage_dim=pl.cdiv(spec.head_dim, _LANES) * _LANES)


@dataclass(frozen=True)
class _Shape:
    """Static sizes of one call."""

    spec: AttentionSpec
    tile: int  # BQ, query tokens; a power of two
    chunk_blocks: int  # KV blocks in a chunk
    storage_dim: int  # Ds
    table_width: int  # P, padded to whole lanes
    num_cores: int

    @property
    def group(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def rows(self) -> int:
        """Rows of a tile's matrices per KV head."""
        return pl.cdiv(self.group * self.tile, _SUBLANES) * _SUBLANES

    @property
    def chunk(self) -> int:
        """C, keys."""
        return self.chunk_blocks * self.spec.block_size

    @property
    def compute_dtype(self) -> Any:
        """Of the operands of both matrix products; they accumulate in float32."""
        return jnp.float32 if "float32" in (self.spec.dtype, self.spec.kv_dtype) else jnp.bfloat16

    def scratch_shapes(self) -> dict[str, Any]:
        spec, Ds, Hk = self.spec, self.storage_dim, self.spec.num_kv_heads
        shapes = {
            "kv": pltpu.VMEM((2, self.chunk_blocks, 2, Hk, spec.block_size, Ds), jnp.dtype(spec.kv_dtype)),
            "q_tile": pltpu.VMEM((2, self.tile, spec.num_heads, Ds), jnp.dtype(spec.dtype)),
            "o_tile": pltpu.VMEM((2, self.tile, spec.num_heads, Ds), jnp.dtype(spec.dtype)),
            "wide_tile": pltpu.VMEM((self.tile, spec.num_heads, Ds), jnp.float32),
            "q_rows": pltpu.VMEM((Hk, self.rows, Ds), jnp.float32),
            "acc": pltpu.VMEM((Hk, self.rows, Ds), jnp.float32),
            "maximum": pltpu.VMEM((Hk, self.rows, _LANES), jnp.float32),
            "total": pltpu.VMEM((Hk, self.rows, _LANES), jnp.float32),
            "table": pltpu.SMEM((_TABLES, 1, self.table_width), jnp.int32),
            "kv_sem": pltpu.SemaphoreType.DMA((2,)),
            "q_sem": pltpu.SemaphoreType.DMA((2,)),
            "o_sem": pltpu.SemaphoreType.DMA((2,)),
            "table_sem": pltpu.SemaphoreType.DMA((_TABLES,)),
        }
        if spec.kv_dtype == "int8":
            shapes["scales"] = pltpu.VMEM((2, self.chunk_blocks, 2, Hk, spec.block_size), jnp.float32)
        return shapes

    def vmem_bytes(self) -> int:
        """VMEM of the scratch buffers, in bytes; the last two dimensions are padded to (8, 128) words of 32 bits."""
        total = 0
        for ref in self.scratch_shapes().values():
            if getattr(ref, "memory_space", None) != pltpu.VMEM:
                continue
            *leading, sublanes, lanes = ref.shape
            itemsize = jnp.dtype(ref.dtype).itemsize
            packed = _SUBLANES * 4 // itemsize
            words = pl.cdiv(sublanes, packed) * packed * pl.cdiv(lanes, _LANES) * _LANES
            total += functools.reduce(lambda a, b: a * b, leading, words) * itemsize
        return total


def attend(
    q: jax.Array,  # [T, Hq, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks = None,  # float32[Hq]
    *,
    interpret: Any = False,
) -> jax.Array:  # [T, Hq, D]
    """See api.ragged_paged_attention. ``interpret`` is pallas_call's, for tests: True or ``pltpu.InterpretParams``."""
    T, D = q.shape[0], spec.head_dim
    storage_dim = pool.values.shape[-1]
    num_rows = batch.context_lens.shape[0]
    narrow = 1 if num_rows >= T else _VERIFY_TILE
    # Whole tiles must fit into the packed tokens, however few there are.
    padded_tokens = T if T == 1 else pl.cdiv(T, _SUBLANES) * _SUBLANES
    q = jnp.pad(q, ((0, padded_tokens - T), (0, 0), (0, storage_dim - D)))
    out = jnp.zeros_like(q)  # padding tokens belong to no tile
    call = functools.partial(_attend_tiles, q, pool, batch, spec, sinks, interpret=interpret)
    out = call(out, cut_tiles(batch, T, narrow, upto=narrow), narrow, _MAX_CHUNK["narrow"])
    if narrow < T:
        wide = _wide_tile(spec, padded_tokens)
        out = call(out, cut_tiles(batch, T, wide, above=narrow), wide, _MAX_CHUNK["wide"])
    return out[:T, :, :D]


def _wide_tile(spec: AttentionSpec, num_tokens: int) -> int:
    """Query tokens of a prefill tile: a power of two that makes about ``_TILE_ROWS`` rows."""
    tile = _TILE_ROWS // (spec.num_heads // spec.num_kv_heads)
    tile = max(min(tile, _MAX_TILE, num_tokens), _SUBLANES)
    tile = 1 << (tile.bit_length() - 1)
    while not _fits(spec, tile, "wide"):  # ends: supports() has refused what doesn't fit with the smallest
        tile //= 2
    return tile


def _fits(spec: AttentionSpec, tile: int, kind: str) -> bool:
    """Whether the buffers of such tiles leave the compiler its part of any generation's VMEM."""
    shape = call_shape(spec, kv_layout(spec).storage_dim, _MAX_CHUNK[kind], tile, _MAX_CHUNK[kind], 1)
    return shape.vmem_bytes() <= _MAX_VMEM


def call_shape(
    spec: AttentionSpec, storage_dim: int, table_width: int, tile: int, max_chunk: int, num_cores: int
) -> _Shape:
    """Sizes of one call: chunks of about ``_CHUNK_BYTES``, no longer than ``max_chunk`` keys or the table."""
    block_bytes = 2 * spec.num_kv_heads * spec.block_size * storage_dim * jnp.dtype(spec.kv_dtype).itemsize
    blocks = min(_CHUNK_BYTES // block_bytes, max_chunk // spec.block_size, table_width)
    return _Shape(
        spec=spec,
        tile=tile,
        chunk_blocks=max(1, blocks),
        storage_dim=storage_dim,
        table_width=pl.cdiv(table_width, _LANES) * _LANES,
        num_cores=num_cores,
    )


def _attend_tiles(
    q: jax.Array,  # [T, Hq, Ds]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks,
    out: jax.Array,  # [T, Hq, Ds], written where tiles are
    tiles: Tiles,
    tile: int,
    max_chunk: int,
    *,
    interpret: Any,
) -> jax.Array:  # [T, Hq, Ds]
    R, P = batch.block_table.shape
    num_cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    shape = call_shape(spec, q.shape[-1], P, tile, max_chunk, num_cores)
    # One row of the table must be a piece of its own in HBM, to be the source of a DMA.
    table = jnp.pad(batch.block_table, ((0, 0), (0, shape.table_width - P)))[:, None, :]
    anywhere, smem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    scalars = (tiles.row, tiles.first_token, tiles.first_pos, tiles.length, tiles.count)
    operands: dict[str, tuple[Any, pl.BlockSpec]] = {
        "out_in": (out, anywhere),
        "q_hbm": (q, anywhere),
        "table_hbm": (table, anywhere),
        "kv_hbm": (pool.values, anywhere),
    }
    if spec.kv_dtype == "int8":
        operands["scales_hbm"] = (pool.scales, anywhere)
    if spec.kv_dtype == "float8_e4m3fn":
        head_scales = jnp.ones((2, spec.num_kv_heads), jnp.float32) if pool.scales is None else pool.scales
        operands["head_scales"] = (head_scales, smem)
    if spec.has_sinks:
        operands["sinks"] = (sinks.astype(jnp.float32), smem)
    scratch = shape.scratch_shapes()

    def kernel(*refs: Any) -> None:
        named = dict(zip(["row", "token", "pos", "length", "count", *operands, "o_hbm", *scratch], refs, strict=True))
        named.pop("out_in")
        _Kernel(shape, named).run()

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_cores,),
            in_specs=[block_spec for _, block_spec in operands.values()],
            out_specs=anywhere,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases={len(scalars): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=shape.vmem_bytes() + SPARE_VMEM
        ),
        interpret=interpret,
        name=f"ragged_paged_attention_{tile}",
    )(*scalars, *(array for array, _ in operands.values()))


class _Kernel:
    """The kernel's body. Tiles of one core are numbered k = 0, 1, ..; ``i`` is a tile's index in the scalar arrays."""

    def __init__(self, shape: _Shape, refs: dict[str, Any]) -> None:
        self.shape = shape
        self.spec = shape.spec
        self.refs = refs

    def run(self) -> None:
        shape, refs = self.shape, self.refs
        core = pl.program_id(0)
        num_tiles = lax.div(refs["count"][0] - core + shape.num_cores - 1, shape.num_cores)

        def index(k: jax.Array | int) -> jax.Array:
            return core + k * shape.num_cores

        @pl.when(num_tiles > 0)
        def _start_first_tile() -> None:
            self.table_copy(index(0), 0).start()
            self.token_copies(index(0), 0, "q", "start")
            self.table_copy(index(0), 0).wait()
            self.chunk_copies(index(0), 0, self.first_chunk(index(0)), 0, "start")

        @pl.when(num_tiles > 1)
        def _start_second_table() -> None:
            self.table_copy(index(1), 1).start()

        def tile_body(k: jax.Array, slot: jax.Array) -> jax.Array:
            i, has_next = index(k), k + 1 < num_tiles

            @pl.when(k + 2 < num_tiles)
            def _start_table() -> None:
                self.table_copy(index(k + 2), k + 2).start()

            @pl.when(has_next)
            def _start_next_q() -> None:
                self.token_copies(index(k + 1), k + 1, "q", "start")

            self.token_copies(i, k, "q", "wait")
            self.pack_rows(k)
            self.reset_softmax()

            def chunk_body(j: jax.Array, slot: jax.Array) -> jax.Array:
                is_last = j + 1 == self.end_chunk(i)

                @pl.when(jnp.logical_not(is_last))
                def _start_next_chunk() -> None:
                    self.chunk_copies(i, k, j + 1, 1 - slot, "start")

                @pl.when(is_last & has_next)
                def _start_next_tile() -> None:
                    self.table_copy(index(k + 1), k + 1).wait()
                    self.chunk_copies(index(k + 1), k + 1, self.first_chunk(index(k + 1)), 1 - slot, "start")

                self.chunk_copies(i, k, j, slot, "wait")
                self.attend_chunk(i, j, slot)
                return 1 - slot

            slot = lax.fori_loop(self.first_chunk(i), self.end_chunk(i), chunk_body, slot)

            @pl.when(k >= 2)
            def _reuse_output_tile() -> None:
                self.token_copies(index(k - 2), k - 2, "o", "wait")

            self.unpack_rows(k)
            self.token_copies(i, k, "o", "start")
            return slot

        lax.fori_loop(0, num_tiles, tile_body, jnp.int32(0))
        for behind in (2, 1):

            @pl.when(num_tiles >= behind)
            def _drain(behind: int = behind) -> None:
                self.token_copies(index(num_tiles - behind), num_tiles - behind, "o", "wait")

    # -- which keys a tile reads -------------------------------------------------------------------------------------

    def end_pos(self, i: jax.Array) -> jax.Array:
        """Keys at or past it aren't read."""
        return self.refs["pos"][i] + self.refs["length"][i]

    def first_chunk(self, i: jax.Array) -> jax.Array | int:
        if self.spec.sliding_window is None:
            return 0
        return lax.div(jnp.maximum(self.refs["pos"][i] - self.spec.sliding_window + 1, 0), self.shape.chunk)

    def end_chunk(self, i: jax.Array) -> jax.Array:
        return lax.div(self.end_pos(i) + self.shape.chunk - 1, self.shape.chunk)

    # -- DMAs --------------------------------------------------------------------------------------------------------

    def table_copy(self, i: jax.Array, k: jax.Array | int) -> Any:
        ring = lax.rem(jnp.int32(k), _TABLES)
        refs = self.refs
        return pltpu.make_async_copy(
            refs["table_hbm"].at[refs["row"][i]], refs["table"].at[ring], refs["table_sem"].at[ring]
        )

    def token_copies(self, i: jax.Array, k: jax.Array | int, which: str, act: str) -> None:
        """q or o of one tile: one DMA for a full tile, one a token for the last tile of a row."""
        refs, tile = self.refs, self.shape.tile
        hbm, slot = refs[f"{which}_hbm"], lax.rem(jnp.int32(k), 2)
        token, length = refs["token"][i], refs["length"][i]

        def copy(outside: Any, inside: Any) -> None:
            source, target = (outside, inside) if which == "q" else (inside, outside)
            getattr(pltpu.make_async_copy(source, target, refs[f"{which}_sem"].at[slot]), act)()

        @pl.when(length == tile)
        def _full() -> None:
            copy(hbm.at[pl.ds(token, tile)], refs[f"{which}_tile"].at[slot])

        if tile > 1:

            @pl.when(length < tile)
            def _partial() -> None:
                _loop(length, lambda t: copy(hbm.at[token + t], refs[f"{which}_tile"].at[slot, t]))

    def chunk_copies(
        self, i: jax.Array, k: jax.Array | int, j: jax.Array | int, slot: jax.Array | int, act: str
    ) -> None:
        """The blocks of chunk ``j`` that the row has: one DMA each, and one for their int8 scales."""
        refs, shape = self.refs, self.shape
        ring = lax.rem(jnp.int32(k), _TABLES)
        left = lax.div(self.end_pos(i) - j * shape.chunk + self.spec.block_size - 1, self.spec.block_size)

        def copy(p: jax.Array) -> None:
            block = refs["table"][ring, 0, j * shape.chunk_blocks + p]
            for hbm, vmem in (("kv_hbm", "kv"), ("scales_hbm", "scales")):
                if hbm in refs:
                    source, target = refs[hbm].at[block], refs[vmem].at[slot, p]
                    getattr(pltpu.make_async_copy(source, target, refs["kv_sem"].at[slot]), act)()

        _loop(jnp.minimum(left, shape.chunk_blocks), copy)

    # -- rows of a tile ----------------------------------------------------------------------------------------------

    def pack_rows(self, k: jax.Array) -> None:
        """q of a tile, [BQ, Hq, Ds], as scaled float32 rows [Hk, G * BQ, Ds]."""
        refs, tile, group = self.refs, self.shape.tile, self.shape.group
        refs["wide_tile"][...] = refs["q_tile"][lax.rem(k, 2)].astype(jnp.float32) * self.spec.scale
        for head in range(self.spec.num_heads):
            h, g = divmod(head, group)
            refs["q_rows"][h, g * tile : (g + 1) * tile, :] = refs["wide_tile"][:, head, :]

    def unpack_rows(self, k: jax.Array) -> None:
        """Normalises the rows and lays them out as an output tile, [BQ, Hq, Ds]."""
        refs, tile, group = self.refs, self.shape.tile, self.shape.group
        for h in range(self.spec.num_kv_heads):
            out = refs["acc"][h] / jnp.maximum(refs["total"][h][:, :1], 1e-30)
            if "head_scales" in refs:
                out = out * refs["head_scales"][1, h]
            refs["acc"][h] = out
            for g in range(group):
                refs["wide_tile"][:, h * group + g, :] = refs["acc"][h, g * tile : (g + 1) * tile, :]
        refs["o_tile"][lax.rem(k, 2)] = refs["wide_tile"][...].astype(refs["o_tile"].dtype)

    def reset_softmax(self) -> None:
        """Nothing seen yet; or only the sink, which is one more key with a given score and a zero value."""
        refs, tile, group = self.refs, self.shape.tile, self.shape.group
        refs["acc"][...] = jnp.zeros(refs["acc"].shape, jnp.float32)
        if not self.spec.has_sinks:
            refs["maximum"][...] = jnp.full(refs["maximum"].shape, _MASKED, jnp.float32)
            refs["total"][...] = jnp.zeros(refs["total"].shape, jnp.float32)
            return
        refs["total"][...] = jnp.ones(refs["total"].shape, jnp.float32)
        for head in range(self.spec.num_heads):
            h, g = divmod(head, group)
            refs["maximum"][h, g * tile : (g + 1) * tile, :] = jnp.full(
                (tile, _LANES), refs["sinks"][head], jnp.float32
            )

    # -- one chunk ---------------------------------------------------------------------------------------------------

    def attend_chunk(self, i: jax.Array, j: jax.Array, slot: jax.Array) -> None:
        """Folds chunk ``j`` into the softmax state. Chunks that every query sees whole skip all masks."""
        first_key, pos = j * self.shape.chunk, self.refs["pos"][i]
        on_edge = first_key + self.shape.chunk > pos + 1
        if self.spec.sliding_window is not None:
            on_edge |= first_key <= self.end_pos(i) - 1 - self.spec.sliding_window

        @pl.when(on_edge)
        def _masked() -> None:
            self.for_heads(functools.partial(self.attend_head, i, first_key, slot, True))

        @pl.when(jnp.logical_not(on_edge))
        def _whole() -> None:
            self.for_heads(functools.partial(self.attend_head, i, first_key, slot, False))

    def for_heads(self, body: Callable[[Any], None]) -> None:
        num_heads = self.spec.num_kv_heads
        unrolled = max(n for n in range(1, max(1, _UNROLLED_ROWS // self.shape.rows) + 1) if num_heads % n == 0)

        def some(group: Any) -> None:
            for n in range(unrolled):
                body(group * unrolled + n)

        if unrolled == num_heads:
            some(0)
        else:
            _loop(jnp.int32(num_heads // unrolled), some)

    def attend_head(self, i: jax.Array, first_key: jax.Array, slot: jax.Array, masked: bool, h: Any) -> None:
        refs, spec, shape = self.refs, self.spec, self.shape
        rows, C, Ds = shape.rows, shape.chunk, shape.storage_dim
        precision = lax.Precision.HIGHEST if shape.compute_dtype == jnp.float32 else None
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        k = refs["kv"][slot, :, 0, h].reshape(C, Ds).astype(shape.compute_dtype)
        v = refs["kv"][slot, :, 1, h].reshape(C, Ds)
        q = refs["q_rows"][h].astype(shape.compute_dtype)

        scores = dot(q, k, (((1,), (1,)), ((), ())))  # float32[rows, C]
        if spec.kv_dtype == "int8":
            scores = scores * self.token_scales(slot, 0, h)
        if spec.kv_dtype == "float8_e4m3fn":
            scores = scores * refs["head_scales"][0, h]
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        if masked:
            key = first_key + lax.broadcasted_iota(jnp.int32, (rows, C), 1)
            token = lax.broadcasted_iota(jnp.int32, (rows, C), 0) & (shape.tile - 1)
            pos = refs["pos"][i] + token
            seen = key <= pos
            if spec.sliding_window is not None:
                seen &= key > pos - spec.sliding_window
            scores = jnp.where(seen, scores, _MASKED)
            # Slots that hold no key may hold NaN, which a weight of zero would let through.
            written = first_key + lax.broadcasted_iota(jnp.int32, (C, Ds), 0) < self.end_pos(i)
            v = jnp.where(written, v.astype(jnp.float32), 0.0)
        v = v.astype(shape.compute_dtype)

        maximum = refs["maximum"][h]
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1, keepdims=True))
        decay = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[:, :1])
        refs["maximum"][h] = new_maximum
        refs["total"][h] = refs["total"][h] * decay + jnp.sum(weights, axis=1, keepdims=True)
        if spec.kv_dtype == "int8":
            scale = self.token_scales(slot, 1, h)
            if masked:
                key = first_key + lax.broadcasted_iota(jnp.int32, (1, C), 1)
                scale = jnp.where(key < self.end_pos(i), scale, 0.0)
            weights = weights * scale
        out = dot(weights.astype(shape.compute_dtype), v, (((1,), (0,)), ((), ())))  # float32[rows, Ds]
        refs["acc"][h] = refs["acc"][h] * decay[:, :1] + out

    def token_scales(self, slot: jax.Array, part: int, h: Any) -> jax.Array:  # float32[1, C]
        blocks = [self.refs["scales"][slot, p, part, pl.ds(h, 1), :] for p in range(self.shape.chunk_blocks)]
        return jnp.concatenate(blocks, axis=1)


def _loop(count: jax.Array, body: Callable[[Any], None]) -> None:
    """``for n in range(count): body(n)`` for effects."""

    def step(n: jax.Array, carry: None) -> None:
        body(n)
        return carry

    lax.fori_loop(0, count, step, None)

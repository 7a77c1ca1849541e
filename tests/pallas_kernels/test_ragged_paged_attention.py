"""The reference of ragged paged attention against the oracle, and the public op around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from attention_cases import FAST_COMPILE, AttentionContract, make_case, make_spec, row_mixes

from pallas_kernels.ragged_paged_attention import api, reference
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

_attend = jax.jit(api.ragged_paged_attention, static_argnums=(3, 4), compiler_options=FAST_COMPILE)


class TestXla(AttentionContract):
    def attend(
        self, q: jax.Array, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: object
    ) -> jax.Array:  # [T, Hq, D]
        return _attend(q, pool, batch, spec, "xla", sinks)

    def supports(self, spec: AttentionSpec) -> str | None:
        return reference.supports(spec)

    def kv_layout(self, spec: AttentionSpec) -> KVLayout:
        return reference.kv_layout(spec)

    def test_reads_a_pool_stored_with_padded_heads(self) -> None:
        """The pool of another implementation can be read, to compare the two."""
        spec = self.spec()
        case = make_case(spec, row_mixes(spec.block_size)["mixed"], layout=KVLayout(storage_dim=128))
        same = make_case(spec, row_mixes(spec.block_size)["mixed"], layout=KVLayout(storage_dim=64))
        padded = self.attend(case.q, case.pool, case.batch, spec, None)
        plain = self.attend(same.q, same.pool, same.batch, spec, None)
        assert jnp.array_equal(padded, plain)


def test_temporary_memory_does_not_grow_with_the_context() -> None:
    """A naive gather of 64 rows x 32k tokens would take 2 GiB here."""
    spec = make_spec()
    R, P = 64, 2048
    shape = reference.kv_layout(spec).values_shape(spec, R * P)
    int32 = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)  # noqa: E731
    batch = RaggedBatch(int32(R, P), int32(R), int32(R + 1), int32(R), int32(R))
    q = jax.ShapeDtypeStruct((R, spec.num_heads, spec.head_dim), jnp.float32)
    pool = KVPool(jax.ShapeDtypeStruct(shape, jnp.float32))
    attend = jax.jit(lambda q, pool, batch: api.ragged_paged_attention(q, pool, batch, spec, "xla"))
    lowered = attend.lower(q, pool, batch)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 << 20


class TestSelection:
    def test_auto_takes_the_reference_on_a_cpu_and_says_why(self) -> None:
        selection = api.select_implementation(make_spec(), "cpu")
        assert selection.implementation == "xla"
        assert "not pallas_gpu: it needs platform 'gpu', this is 'cpu'" in selection.explanation
        assert "not pallas_tpu: it needs platform 'tpu', this is 'cpu'" in selection.explanation

    def test_auto_takes_the_kernel_of_the_platform(self) -> None:
        spec = make_spec(head_dim=128, block_size=128, dtype="bfloat16", kv_dtype="bfloat16")
        assert api.select_implementation(spec, "tpu").implementation == "pallas_tpu"

    def test_a_refusal_is_explained_and_the_next_one_is_taken(self) -> None:
        spec = make_spec(block_size=8, head_dim=128)
        selection = api.select_implementation(spec, "tpu")
        assert selection.implementation == "xla"
        assert "not pallas_tpu: block_size 8" in selection.explanation

    @pytest.mark.parametrize("requested", ["pallas_gpu", "pallas_tpu", "triton"])
    def test_a_request_that_cannot_be_met_raises_with_the_reason(self, requested: str) -> None:
        with pytest.raises(api.UnsupportedAttentionError, match=f"'{requested}' can't be used: "):
            api.select_implementation(make_spec(), "cpu", requested)

    def test_the_reference_can_be_forced_anywhere(self) -> None:
        assert api.select_implementation(make_spec(), "cuda", "xla").implementation == "xla"

    def test_a_gpu_that_is_not_hopper_is_refused(self) -> None:
        reason = api.refusal(make_spec(), "cuda", "pallas_gpu", compute_capability="8.0")
        assert reason is not None and "8.0" in reason


class TestArguments:
    def test_wrong_shapes_and_dtypes_are_named(self) -> None:
        spec = make_spec()
        case = make_case(spec, [(5, 1)], layout=reference.kv_layout(spec))
        run = api.ragged_paged_attention
        with pytest.raises(ValueError, match=r"q is float32\[1, 4, 32\]"):
            run(case.q[..., :32], case.pool, case.batch, spec, "xla")
        with pytest.raises(ValueError, match="the pool is bfloat16"):
            run(case.q, KVPool(case.pool.values.astype(jnp.bfloat16)), case.batch, spec, "xla")
        with pytest.raises(ValueError, match="sinks are given"):
            run(case.q, case.pool, case.batch, spec, "xla", jnp.zeros(4))
        with pytest.raises(ValueError, match="int8 pool needs scales"):
            run(
                case.q,
                KVPool(case.pool.values.astype(jnp.int8)),
                case.batch,
                make_spec(kv_dtype="int8"),
                "xla",
            )

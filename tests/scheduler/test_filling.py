"""Steps that fill their buckets, against the costs tried one by one."""

from itertools import product

from jaxserve.scheduler.filling import WORTHWHILE, tokens_to_run

SIZES = (512, 1024, 2048, 4096, 8192)


def padded(tokens, sizes):
    return next((size for size in sizes if size >= tokens), tokens)


def test_a_few_tokens_above_a_bucket_wait_for_the_next_step():
    assert tokens_to_run(2146, 256, SIZES, 256) == 2048


def test_what_fills_its_bucket_or_most_of_it_runs_at_once():
    for tokens in (1, 300, 512, 1024, 8192, 3000, 4000, 1100):
        assert tokens_to_run(tokens, 8, SIZES, 256) == tokens


def test_without_buckets_or_above_them_nothing_waits():
    assert tokens_to_run(2146, 256, (), 256) == 2146
    assert tokens_to_run(300, 1, (512,), 0) == 300


def test_a_step_is_cut_exactly_where_that_pays():
    for tokens, rows, fixed in product(range(1, 70), (0, 1, 5), (0, 2, 9)):
        for sizes in ((4, 8, 16, 32, 64), (8, 64), (3, 5, 7)):
            run = tokens_to_run(tokens, rows, sizes, fixed)
            whole = fixed + padded(tokens, sizes)
            smaller = [size for size in sizes if size < tokens]
            if not smaller:
                assert run == tokens
                continue
            parts = 2 * fixed + smaller[-1] + padded(tokens - smaller[-1] + rows, sizes)
            assert run == (smaller[-1] if parts <= WORTHWHILE * whole else tokens)

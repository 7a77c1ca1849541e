"""The queues keep order, and forget what has left them."""

import random

from scheduler_world import HashModel, World

from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Choice, Scheduler, SchedulerConfig, Status
from jaxserve.scheduler.waiting import WaitingQueue


def make_choice(number, priority=0, **settings):
    params = SamplingParams(max_tokens=2, priority=priority, **settings)
    choice = Choice(choice_id=number, prompt_token_ids=[1], params=params, arrival_time=0.0)
    choice.order = (priority, number)
    return choice


def test_order_and_stale_entries_against_a_sorted_list():
    rng = random.Random(0)
    queue, model = WaitingQueue(), []
    for number in range(400):
        action = rng.random()
        if action < 0.5 or not model:
            choice = make_choice(number, rng.randint(0, 3))
            queue.push(choice)
            model.append(choice)
        elif action < 0.75:
            choice = model.pop(rng.randrange(len(model)))
            choice.status = Status.FINISHED
            queue.mark_stale()
        else:
            head = min(model, key=lambda choice: choice.order)
            assert queue.head() is head
            queue.pop()
            model.remove(head)
        assert len(queue) == len(model) == len(queue.choices())
        assert len(queue._heap) <= 2 * len(model) + 1


def test_aborted_choices_are_forgotten():
    config = SchedulerConfig(
        max_num_seqs=1, max_model_len=8, max_num_batched_tokens=8, block_size=2, num_blocks=4, max_seconds=3600.0
    )
    scheduler = Scheduler(config)
    for number in range(2000):
        choice = make_choice(number)
        scheduler.add(choice)
        scheduler.finish(choice, "abort")
    assert len(scheduler.state.waiting._heap) <= 1 and len(scheduler._deadlines) <= 66
    scheduler.check_invariants()


def test_thousands_of_waiting_choices_end():
    config = SchedulerConfig(
        max_num_seqs=8, max_model_len=16, max_num_batched_tokens=32, block_size=4, num_blocks=40, max_drafts=2
    )
    world = World(config, HashModel())
    choices = [make_choice(number, priority=number % 3) for number in range(3000)]
    for choice in choices:
        world.scheduler.add(choice)
    steps = 0
    while world.scheduler.has_work:
        plan = world.scheduler.schedule()
        steps += 1
        world.scheduler.commit(plan, world.device.execute(plan, lambda most: (most, most)))
    assert steps < 3000 and all(choice.finished for choice in choices)

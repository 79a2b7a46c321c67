"""乱来一通：随机加、取消、前进几百次，什么都不漏，写完的每一段都对。"""

import gc
import random

import pytest
from engine_helpers import drain, prompts_of, tiny

from minimind.inference.engine import Engine, Sequence
from minimind.inference.requests import Request, Row
from minimind.inference.sampling import GREEDY, SamplingParams


def alive():
    gc.collect()
    return sum(type(one) in (Sequence, Request, Row) for one in gc.get_objects())


@pytest.mark.parametrize("chunk", [None, 4, 24])
@pytest.mark.parametrize("store", [0, 96])
def test_五百次随机操作之后_什么都不剩(chunk, store):
    before = alive()
    rng, model = random.Random(chunk or 1), tiny()
    engine = Engine(model, eos_ids={5, 9, 33}, max_slots=4, prefill_chunk=chunk, prefix_cache_tokens=store)
    pool = prompts_of([1, 3, 20, 50])
    pool += [pool[3][:40] + rest for rest in prompts_of([1, 9, 30], seed=2)]
    open_, done, asked = {}, {}, {}

    def collect(finished):
        for sequence in finished:
            key = sequence.request_id, sequence.index
            assert key not in done and sequence.finished is not None
            done[key] = sequence
            open_[sequence.request_id].discard(sequence.index)

    for _ in range(500):
        action = rng.random()
        if action < 0.25:
            prompt = rng.choice(pool)
            params = rng.choice([GREEDY, SamplingParams(temperature=1.0, seed=rng.randint(0, 3))])
            n = rng.choice([1, 1, 2, 6])
            request = engine.add_request(prompt, params, rng.randint(1, 12), n=n)
            open_[request], asked[request] = set(range(n)), (prompt, params)
        elif action < 0.4 and open_:
            request = rng.choice(list(open_))
            engine.cancel(request, rng.choice([None, 0, 1]))
        else:
            collect(engine.step())
        admission = engine._admission
        half_read = [one for one in admission.queue if 0 < one.read < len(one.prompt_ids)]
        assert len(half_read) <= 1 and len(engine.running) + len(half_read) <= 4
        assert store == 0 or len(admission.prefixes) <= store
    while engine.has_unfinished:
        collect(engine.step())
    assert not any(open_.values()) and not engine.running and not engine._admission.queue

    plain = Engine(model, eos_ids={5, 9, 33}, max_slots=32)
    again = {plain.add_request(prompt, params, 12, n=6): key for key, (prompt, params) in asked.items()}
    want = {(again[request], index): one.ids for (request, index), one in drain(plain).items()}
    for key, sequence in done.items():
        assert sequence.ids == want[key][: len(sequence.ids)], "取消的是它的开头，写完的是到上限为止"
    reasons = {sequence.finished for sequence in done.values()}
    assert reasons == {"stop", "length", "cancelled"}
    done.clear(), open_.clear()
    del engine, plain, sequence, admission, half_read
    assert alive() == before

"""Whose turn it is, against a model that looks at everything anew each time; and what that is worth to a tenant."""

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from core_rig import BLOCK_TOKENS, make_core, make_request
from lorasrv.engine.core import EngineCore
from lorasrv.errors import QueueFull
from lorasrv.sched.fairness import Share, Shares
from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.sequence import Sequence
from lorasrv.types import EngineRequest, Priority

TENANTS = {"acme": 1.0, "umbrella": 1.0, "initech": 2.5}


@dataclass
class Model:
    """Virtual token counters by their definition: lists of everything, looked through every time."""

    places: int
    served: dict[str, float] = field(default_factory=dict[str, float])
    waiting: list[tuple[Priority, int, EngineRequest]] = field(
        default_factory=list["tuple[Priority, int, EngineRequest]"]
    )
    running: dict[str, EngineRequest] = field(default_factory=dict[str, EngineRequest])
    last_out: float = 0.0
    num_arrived: int = 0

    def arrive(self, request: EngineRequest) -> None:
        tenants = {other.tenant for _, _, other in self.waiting}
        if request.tenant not in tenants:
            level = min((self.served[tenant] for tenant in tenants), default=self.last_out)
            self.served[request.tenant] = max(self.served.get(request.tenant, 0.0), level)
        self.num_arrived += 1
        self.waiting.append((request.priority, self.num_arrived, request))

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.places:
            first = min(self.waiting, key=lambda each: (each[0], self.served[each[2].tenant], each[1]))
            self.waiting.remove(first)
            request = first[2]
            self.running[request.request_id] = request
            self.served[request.tenant] += len(request.token_ids) / request.weight
            if request.tenant not in {other.tenant for _, _, other in self.waiting}:
                self.last_out = self.served[request.tenant]

    def token(self, request_id: str, *, last: bool) -> None:
        request = self.running[request_id]
        self.served[request.tenant] += 2 / request.weight
        if last:
            del self.running[request_id]


def random_request(rng: Random, number: int) -> EngineRequest:
    tenant = rng.choice(list(TENANTS))
    request = make_request(str(number), (1,) * rng.randint(1, 30), None, rng.randint(1, 20), tenant=tenant)
    priority = Priority.BATCH if rng.random() < 0.2 else Priority.NORMAL
    return replace(request, weight=TENANTS[tenant], ignore_eos=True, priority=priority)


@pytest.mark.parametrize("seed", range(5))
def test_admissions_are_those_of_the_definition(seed: int) -> None:
    """With room for all, the only question is whose turn it is."""
    rng = Random(seed)
    places = rng.randint(1, 6)
    core, _ = make_core({}, num_pages=2000, max_running=places)
    model = Model(places)
    for step in range(400):
        for _ in range(rng.choice((0, 0, 0, 1, 3)) if step < 300 else 0):
            request = random_request(rng, model.num_arrived)
            core.add(request)
            model.arrive(request)
        deltas = core.step()
        core.check()
        model.admit()
        for delta in deltas:
            if delta.token_ids:
                model.token(delta.request_id, last=delta.finish is not None)
        assert {sequence.request_id for sequence in core._running} == set(model.running)
    assert model.num_arrived > 100


def backlog(core: EngineCore, rng: Random, sizes: dict[str, tuple[int, int, int]], weights: dict[str, float]) -> None:
    """Requests of each tenant: how many, their prompts and outputs at most."""
    for tenant, (count, max_prompt, max_tokens) in sizes.items():
        for number in range(count):
            prompt = tuple(rng.randrange(1, 50) for _ in range(rng.randint(1, max_prompt)))
            request = make_request(f"{tenant}{number}", prompt, None, rng.randint(1, max_tokens), tenant=tenant)
            core.add(replace(request, ignore_eos=True, weight=weights[tenant]))


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("num_pages", [60, 2000])
def test_service_gap_is_within_the_bound(weight: float, num_pages: int) -> None:
    """Of two tenants that both wait all the time; one sends ten times as many, and longer ones. Preempted ones too."""
    rng, places, longest = Random(7), 8, 40
    core, _ = make_core({}, num_pages=num_pages, max_running=places)
    weights = {"greedy": 1.0, "modest": weight}
    backlog(core, rng, {"greedy": (900, longest, 20), "modest": (1300, 6, 6)}, weights)
    prompts = {request_id: len(sequences[0].token_ids) for request_id, sequences in core._requests.items()}
    served: Counter[str] = Counter()
    begun: set[str] = set()
    # Theorem 4.4 of the paper; in this pool at most so many tokens can run at once.
    bound = 2 * max(longest, 2 * min(num_pages * BLOCK_TOKENS, places * (longest + 20))) / min(weights.values())
    waiting = {"greedy", "modest"}
    worst = 0.0
    while waiting == {"greedy", "modest"}:
        for delta in core.step():
            tenant = delta.request_id.rstrip("0123456789")
            if delta.request_id not in begun:
                begun.add(delta.request_id)
                served[tenant] += prompts[delta.request_id] / weights[tenant]
            served[tenant] += 2 * len(delta.token_ids) / weights[tenant]
        waiting = {sequence.share.tenant for sequence in core._waiting}
        if len(waiting) == 2:
            worst = max(worst, abs(served["greedy"] - served["modest"]))
    assert 0 < worst <= bound
    assert min(served.values()) > 2 * bound  # long enough to tell


def test_a_tenant_that_comes_back_has_saved_up_no_turns() -> None:
    shares = Shares()
    away, here = shares.open("away", 1.0), shares.open("here", 1.0)
    shares.enqueue(here, lift=True)
    here.served = 100.0
    shares.enqueue(away, lift=True)
    assert away.served == 100.0
    shares.dequeue(away)
    away.served = 250.0
    shares.enqueue(away, lift=True)
    assert away.served == 250.0
    shares.check()


def test_tenants_that_are_gone_are_forgotten() -> None:
    shares = Shares()
    for number in range(10_000):
        share = shares.open(str(number), 1.0)
        shares.enqueue(share, lift=True)
        shares.dequeue(share)
        shares.close(share)
    assert len(shares._shares) < 200
    shares.check()


def make_sequence(number: int, rng: Random, shares: Shares) -> Sequence:
    request = random_request(rng, number)
    if rng.random() < 0.7:
        request = make_request(str(number), request.token_ids, rng.choice("abc"), tenant=request.tenant)
    core, _ = make_core({"a": 1, "b": 1, "c": 1})
    sequence = core._new_sequence(request, 0)
    sequence.share = shares.open(request.tenant, request.weight)
    sequence.order = (request.priority, number)
    return sequence


def test_ten_thousand_random_changes_of_a_queue() -> None:
    rng, shares = Random(3), Shares()
    queue, resident = WaitingQueue(shares), {"a"}
    queued: list[Sequence] = []
    pool = [make_sequence(number, rng, shares) for number in range(60)]
    for _ in range(10_000):
        what = rng.random()
        free = [sequence for sequence in pool if not sequence.queued]
        if what < 0.4 and free:
            sequence = rng.choice(free)
            away = sequence.digest is not None and sequence.digest not in resident
            queue.add(sequence, away=away, again=rng.random() < 0.3)
            queued.append(sequence)
        elif what < 0.7 and queued:
            queue.remove(queued.pop(rng.randrange(len(queued))))
        elif what < 0.9:
            digest = rng.choice("abc")
            (resident.discard if digest in resident else resident.add)(digest)
            queue.move(digest, away=digest not in resident)
        else:
            rng.choice(pool).share.served += rng.random() * 50
        queue.check(resident)
        assert list(queue) == sorted(queued, key=_turn) and len(queue) == len(queued)
        away_ones = [s for s in sorted(queued, key=_turn) if s.digest is not None and s.digest not in resident]
        assert list(queue.next_away(99, 99)) == _digests(away_ones, 99, 99)
        num_digests, num_sequences = rng.randint(0, 3), rng.randint(0, 20)
        assert list(queue.next_away(num_digests, num_sequences)) == _digests(away_ones, num_digests, num_sequences)
        for digest in "abc":
            assert set(queue.for_digest(digest)) == {s for s in queued if s.digest == digest}
        places = {sequence: place for place, sequence in queue.places()}
        assert places == _places(queued)
        behind = rng.choice(pool)  # queued or not
        told = list(queue.places(behind))
        assert told == [each for each in queue.places() if _line(each[1]) > _line(behind)]


def _digests(away: list[Sequence], num_digests: int, num_sequences: int) -> list[str]:
    """Of those that go first when each is charged for as it goes."""
    left, digests, charged = list(away), list[str](), dict[Share, float]()
    while left and num_sequences and len(digests) < num_digests:
        first = min(left, key=lambda s: (s.order[0], s.share.served + charged.get(s.share, 0.0), s.order))
        left.remove(first)
        charged[first.share] = charged.get(first.share, 0.0) + first.admission_cost
        num_sequences -= 1
        if first.digest is not None and first.digest not in digests:
            digests.append(first.digest)
    return digests


def _line(sequence: Sequence) -> tuple[int, str, int]:
    priority, arrival = sequence.order
    return priority, sequence.share.tenant, arrival


def _turn(sequence: Sequence) -> tuple[int, float, int]:
    priority, arrival = sequence.order
    return priority, sequence.share.served, arrival


def _places(queued: list[Sequence]) -> dict[Sequence, int]:
    places: dict[Sequence, int] = {}
    for tenant in {sequence.share.tenant for sequence in queued}:
        own = sorted((s for s in queued if s.share.tenant == tenant), key=lambda s: s.order)
        places |= {sequence: place for place, sequence in enumerate(own)}
    return places


def test_what_is_granted_counts_within_a_walk() -> None:
    core, _ = make_core({})
    for tenant in ("acme", "umbrella"):
        for number in range(3):
            core.add(make_request(f"{tenant}{number}", (1,) * 10, tenant=tenant))
    walk, seen = core._waiting.turns(), []
    for sequence in walk:
        seen.append(sequence.request_id)
        walk.grant(sequence)
    assert seen == ["acme0", "umbrella0", "acme1", "umbrella1", "acme2", "umbrella2"]
    assert [sequence.request_id for sequence in core._waiting][:3] == ["acme0", "acme1", "acme2"]


def test_a_flood_fills_its_own_tenants_queue_alone() -> None:
    core, _ = make_core({}, max_running=1, max_waiting=3)
    for number in range(3):
        core.add(make_request(f"greedy{number}", tenant="greedy"))
    core.add(replace(make_request("modest", tenant="modest"), n=3))
    for tenant in ("greedy", "modest"):
        with pytest.raises(QueueFull, match="3 sequences are waiting; the limit is 3"):
            core.add(make_request("one more", tenant=tenant))
    core.check()

"""Which worker is given which range, and who has it when workers are lost; no cluster is needed."""

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayTaskError
from ray.util.client import ray as client

from batchclf import __version__
from batchclf.engines.ray import dealing, finding, losing
from batchclf.engines.ray.cluster import REPEAT_S, Demand, Need, Node
from batchclf.engines.ray.crew import RayCrew
from batchclf.engines.ray.dealing import Dealing
from batchclf.engines.ray.finding import NODES_S, START_S, WORTH_S, Finding
from batchclf.engines.ray.losing import MAX_FAILURES, Losing
from batchclf.engines.ray.member import Errand
from batchclf.engines.ray.pace import Pace
from batchclf.engines.ray.roster import Hand, Roster
from batchclf.engines.ray.station import Look
from batchclf.errors import BatchclfError, EnvironmentFailed, UsageError, WorkerFailed
from batchclf.results.files import RunFiles
from batchclf.results.listing import Listing
from batchclf.results.parts import Committed, Folders
from batchclf.results.records import ImageRef
from batchclf.run.duty import Doubt, Landmark
from batchclf.run.ranges import Gaps
from batchclf.system.interrupt import StopRequest
from tests.engines.ray.test_shares import job
from tests.results.common import placed

NUM_IMAGES = 64
NODES = [Node(name, name, {"CPU": 2.0}) for name in ("near", "far")]


class Actor:
    """Is asked to do things, and does none."""

    def __init__(self) -> None:
        self.attempts: list[Any] = []
        self.do = self.open = self
        self.stop = SimpleNamespace(remote=lambda: None)

    def options(self, name: str) -> "Actor":
        return self

    def remote(self, attempt: object, *more: object) -> object:
        self.attempts.append(attempt)
        return object()


def hand(node: Node = NODES[0], *, is_first: bool = True) -> Hand:
    return Hand(node, Actor(), Pace(batch_size=4), is_first, is_open=True)


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return placed(RunFiles(tmp_path), [b"%02d.jpg" % number for number in range(NUM_IMAGES)])


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "parts", tmp_path / "drafts")


def spans_of(one: Hand) -> list[tuple[int, int]]:
    return [(lot.range.first, lot.range.num_images) for lot in one.lots]


def test_each_worker_has_two_ranges_and_what_a_lost_one_had_is_dealt_first(
    listing: Listing, folders: Folders
) -> None:
    dealt, ranges = Dealing(), Gaps(listing, [(0, NUM_IMAGES)], 0)
    one, other = hand(), hand()
    dealt.deal([one, other], ranges, folders)
    assert spans_of(one) == [(0, 16), (16, 12)]
    assert spans_of(other) == [(28, 9), (37, 8)]
    assert [lot.range.first for lot in dealt.take_back(one)] == [0, 16]
    assert one.lots == []
    third = hand()
    dealt.deal([third], ranges, folders)
    assert spans_of(third) == [(0, 16), (16, 12)]
    assert len({attempt.draft for attempt in (*one.actor.attempts, *third.actor.attempts)}) == 4


def test_what_a_part_lacks_of_its_range_is_dealt_again(listing: Listing, folders: Folders) -> None:
    dealt, ranges = Dealing(), Gaps(listing, [(0, 8)], 0)
    one, other = hand(), hand()
    dealt.deal([one], ranges, folders)
    assert dealt.has_done(Committed(0, 100, 5, Counter()), ranges)
    assert not dealt.has_done(Committed(0, 100, 5, Counter()), ranges), "the other attempt at it"
    assert dealt.is_busy
    dealt.deal([other], ranges, folders)
    assert spans_of(other) == [(5, 3)]
    assert dealt.has_done(Committed(5, 60, 3, Counter()), ranges)
    assert not dealt.is_busy


def test_a_range_that_two_workers_are_at_counts_once_in_what_is_underway(
    listing: Listing, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "DOUBLE_S", 0.0)
    dealt, ranges, roster = Dealing(), Gaps(listing, [(0, 8)], 0), Roster()
    roster.hands = [hand(), hand()]
    for one in roster.hands:
        dealt.deal([one], ranges, folders)
        one.look = Look(5, 2, None, (), 1)
    assert [spans_of(one) for one in roster.hands] == [[(0, 8)], [(0, 8)]]
    assert roster.underway() == (5, 2)
    dealt.take_back(roster.hands.pop(0))
    assert roster.underway() == (5, 2)


def test_an_answer_that_a_later_one_has_overtaken_counts_nothing_twice(
    listing: Listing, folders: Folders
) -> None:
    dealt, ranges, roster = Dealing(), Gaps(listing, [(0, NUM_IMAGES)], 0), Roster()
    roster.hands = [hand()]
    dealt.deal(roster.hands, ranges, folders)
    for look in (Look(5, 2, None, (), 1), Look(1, 0, None, (), 3), Look(5, 2, None, (), 2)):
        roster.hands[0].has_looked(look)
    assert roster.underway() == (1, 0)


# ---- nodes ---------------------------------------------------------------------------------------


@pytest.fixture
def order(tmp_path: Path) -> SimpleNamespace:
    engine = SimpleNamespace(workers="auto", allow_fewer=False, max_retries=2, wait_for_nodes=None)
    said: list[str] = []
    job = SimpleNamespace(engine=engine)
    return SimpleNamespace(job=job, log=said.append, said=said, stop=StopRequest())


@pytest.fixture
def found(
    order: Any, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Roster, Finding, Losing]]:
    """A cluster of two nodes with room for two workers each."""
    for module in (finding, losing):
        monkeypatch.setattr(module, "nodes", lambda: NODES)
    monkeypatch.setattr("ray.kill", lambda actor: None)

    def make() -> tuple[Roster, Finding, Losing]:
        roster = Roster()
        looking = Finding(order, roster, folders)
        looking.need = Need(1.0, 0.0)
        return roster, looking, Losing(order, roster, looking, Dealing())

    return make


def test_a_node_whose_memory_ran_out_has_one_worker_fewer_and_at_least_one(
    order: Any, found: Callable[[], tuple[Roster, Finding, Losing]]
) -> None:
    roster, looking, trouble = found()
    roster.hands = [hand(), hand()]
    ended = OutOfMemoryError("killed")
    trouble.is_gone(roster.hands[0], ended)
    assert looking.rooms() == {NODES[1]: 2}
    assert order.said == [
        "node near: a worker was ended by Ray, as memory ran out there "
        "(RAY_memory_usage_threshold); 1 go on"
    ]
    trouble.has_done(roster.hands[0])
    for _ in range(MAX_FAILURES):
        roster.hands = [hand()]
        trouble.is_gone(roster.hands[0], ended)
    assert looking.rooms() == {NODES[1]: 2}
    assert "memory does not suffice for one worker: Ray ended 3 one after the" in order.said[-1]
    for _ in range(MAX_FAILURES - 1):
        roster.hands = [hand(NODES[1])]
        trouble.is_gone(roster.hands[0], ended)
    roster.hands = [hand(NODES[1])]
    with pytest.raises(EnvironmentFailed, match="node far: memory does not suffice"):
        trouble.is_gone(roster.hands[0], ended)


def test_a_node_whose_input_is_not_the_drivers_is_given_up_at_once(
    order: Any, found: Callable[[], tuple[Roster, Finding, Losing]]
) -> None:
    roster, looking, trouble = found()
    roster.hands = [hand(), hand(), hand(NODES[1])]
    trouble.is_misled(roster.hands[0], EnvironmentFailed("a.jpg is not there"))
    assert [one.node for one in roster.hands] == [NODES[1]]
    assert looking.rooms() == {NODES[1]: 1}
    assert order.said[0] == "going on without this node: node near: a.jpg is not there"
    with pytest.raises(EnvironmentFailed, match=r"node far: a\.jpg is not there"):
        trouble.is_misled(roster.hands[0], EnvironmentFailed("a.jpg is not there"))


def test_a_worker_that_begins_late_is_to_see_the_landmarks_that_are_there_by_then(
    order: Any, found: Callable[[], tuple[Roster, Finding, Losing]]
) -> None:
    left = (Landmark(ImageRef(0, b"a.jpg"), 7),)
    order.witness = SimpleNamespace(landmarks_left=lambda: left)
    _, looking, _ = found()
    gone = (*left, Landmark(ImageRef(1, b"b.jpg"), 8))
    looking._errand = cast(Any, Errand)(*(None,) * 11, landmarks=gone)
    looking._packed = b""
    late = hand()
    looking.greet(late, {"batchclf": __version__, "Python": platform.python_version()})
    assert late.actor.attempts[0].landmarks == left


def test_a_range_that_workers_are_lost_with_is_not_tried_for_ever(
    order: Any,
    found: Callable[[], tuple[Roster, Finding, Losing]],
    listing: Listing,
    folders: Folders,
) -> None:
    roster, looking, _ = found()
    dealt, ranges = Dealing(), Gaps(listing, [(0, 8)], 0)
    trouble = Losing(order, roster, looking, dealt)
    for number in range(3):
        roster.hands = [hand()]
        dealt.deal(roster.hands, ranges, folders)
        if number < 2:
            trouble.lose(roster.hands[0], "died")
    with pytest.raises(WorkerFailed, match="images 0 to 7: 3 workers were lost with them"):
        trouble.lose(roster.hands[0], "died")


@pytest.mark.parametrize(
    ("seconds_left", "expected"), [(10 * WORTH_S, 4), (1.5 * WORTH_S, 3), (0.5 * WORTH_S, 2)]
)
def test_more_nodes_are_asked_for_while_there_is_work_for_them(
    found: Callable[[], tuple[Roster, Finding, Losing]],
    monkeypatch: pytest.MonkeyPatch,
    seconds_left: float,
    expected: int,
) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles)
    )
    roster, looking, _ = found()
    roster.hands = [hand(), hand()]
    for one in roster.hands:
        one.pace.images_per_s = 50.0
    looking.ask_for_more(int(100 * seconds_left))
    looking.close()
    assert asked == [[{"CPU": 1.0}] * expected, []]


# ---- nodes that others use -----------------------------------------------------------------------


@pytest.fixture
def one_wanted(
    order: Any,
    found: Callable[[], tuple[Roster, Finding, Losing]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[set[str] | None], list[Hand]]:
    """Has one worker looked for, where some nodes are idle; those that are waited for then."""
    order.job.engine.workers = 1
    roster, looking, _ = found()

    def started(self: Finding, node: Node) -> Hand:
        one = Hand(node, Actor(), Pace(batch_size=4), is_first=True)
        one.calls[object()] = ("hello", None)
        return one

    def grown(idle: set[str] | None) -> list[Hand]:
        monkeypatch.setattr(finding, "idle_nodes", lambda need: idle)
        looking.look_again()
        looking.grow()
        return roster.hands

    monkeypatch.setattr(Finding, "_started", started)
    return grown


def test_few_workers_are_started_on_nodes_that_nobody_uses(
    one_wanted: Callable[[set[str] | None], list[Hand]],
) -> None:
    (waiting,) = one_wanted({"far"})
    assert waiting.node is NODES[1]


@pytest.mark.parametrize("idle", [{"far"}, None])
def test_a_worker_that_a_busy_node_does_not_start_is_tried_on_another(
    order: Any, one_wanted: Callable[[set[str] | None], list[Hand]], idle: set[str] | None
) -> None:
    (waiting,) = one_wanted({"near"})
    assert waiting.node is NODES[0]
    assert one_wanted(idle) == [waiting], "it has just been asked for"
    waiting.started_at -= START_S
    assert one_wanted({"near", "far"}) == [waiting], "it is being started"
    (moved,) = one_wanted(idle)
    assert moved.node is NODES[1]
    assert "one is tried on node far instead" in order.said[-1]
    moved.started_at -= START_S
    assert one_wanted({"near"}) == [moved], "it may be as slow to start there"


# ---- an autoscaler -------------------------------------------------------------------------------


def test_what_an_autoscaler_was_asked_for_is_repeated_until_it_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles)
    )
    demand = Demand(print)
    demand.ask(Need(2.0, 0.0), 1)
    demand.repeat()
    assert asked == [[{"CPU": 2.0}]]
    demand._asked_at -= REPEAT_S
    demand.repeat()
    assert asked == [[{"CPU": 2.0}]] * 2, "the end of another job has wiped it"
    demand.take_back()
    demand._asked_at -= REPEAT_S
    demand.repeat()
    demand.close(1.0)
    assert asked == [[{"CPU": 2.0}], [{"CPU": 2.0}], []]


def test_what_does_not_arrive_through_rays_client_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[dict[str, float]]] = []
    waited: list[float] = []

    def late(call: object, timeout: float) -> None:
        waited.append(timeout)
        raise GetTimeoutError("not ready")

    class Speaker:
        def __init__(self) -> None:
            self.request = self
            started.append(self)

        def remote(self, bundles: list[dict[str, float]]) -> object:
            sent.append(bundles)
            return object()

    started: list[Speaker] = []
    options = SimpleNamespace(options=lambda **keys: SimpleNamespace(remote=Speaker))
    monkeypatch.setattr(client, "is_connected", lambda: True)
    monkeypatch.setattr("ray.remote", lambda actor: options)
    monkeypatch.setattr("ray.get", late)
    said: list[str] = []
    demand = Demand(said.append)
    demand.ask(Need(2.0, 0.0), 1)
    demand.ask(Need(2.0, 0.0), 2)
    demand.close(7.0)
    assert (sent, waited) == ([[{"CPU": 2.0}], [{"CPU": 2.0}] * 2, []], [7.0])
    assert len(started) == 1, "it is told all, in this order"
    assert "did not arrive within 7 s: not ready; nodes may not come, or not go" in said[-1]


@pytest.mark.parametrize(
    ("wait_s", "expected"), [(0.3, EnvironmentFailed), (0.0, UsageError), (None, UsageError)]
)
def test_nodes_that_were_waited_for_in_vain_are_the_environments_failure(
    order: Any,
    found: Callable[[], tuple[Roster, Finding, Losing]],
    monkeypatch: pytest.MonkeyPatch,
    wait_s: float | None,
    expected: type[BatchclfError],
) -> None:
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    order.job = job(num_cpus=9, wait_for_nodes=wait_s)
    order.beat = lambda: None
    _, looking, _ = found()
    with pytest.raises(expected, match="each worker takes 9 CPU, and no node of the") as raised:
        looking.prepare()
    assert raised.type is expected


@pytest.mark.parametrize(("asked", "patience_s"), [(None, NODES_S), (7.0, 7.0)])
def test_where_all_nodes_are_lost_others_are_waited_for_to_an_end(
    order: Any,
    found: Callable[[], tuple[Roster, Finding, Losing]],
    monkeypatch: pytest.MonkeyPatch,
    asked: float | None,
    patience_s: float,
) -> None:
    order.job.engine.wait_for_nodes = asked
    roster, looking, _ = found()
    there: list[Node] = []
    monkeypatch.setattr(finding, "nodes", lambda: there)
    for _ in range(2):
        looking.await_nodes()
        looking.await_nodes()
        assert looking._left_alone_at is not None
        looking._left_alone_at -= patience_s - 1.0
        looking.await_nodes()
        there.append(NODES[0])
        looking.await_nodes()  # it has room
        roster.hands = [hand()]
        there.clear()
        looking.await_nodes()  # it is not known to be lost
        roster.hands = []
    told = f"waiting for one to join, up to {patience_s:g} s (engine.wait_for_nodes)"
    assert order.said == [f"no node is left to work on; {told}"] * 2
    looking.await_nodes()
    assert looking._left_alone_at is not None
    looking._left_alone_at -= patience_s
    with pytest.raises(EnvironmentFailed, match=f"none has joined in {patience_s:g} s"):
        looking.await_nodes()


# ---- a job that is to end ------------------------------------------------------------------------


@pytest.mark.usefixtures("found")
def test_a_crew_that_drains_hires_nobody_asks_about_nothing_and_drops_what_fails(
    order: Any, listing: Listing, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order.job.engine.workers, order.files, order.witness = 2, RunFiles(tmp_path), None
    crew = RayCrew(order, ExitStack())
    hands = crew._roster.hands = [hand(), hand(NODES[1])]
    for one in hands:
        one.looks_at = math.inf
    asked: list[list[dict[str, float]]] = []
    crew._finding.need = Need(1.0, 0.0)
    monkeypatch.setattr(
        "ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles)
    )
    crew._finding._demand.ask(crew._finding.need, 2)
    monkeypatch.setattr(finding, "idle_nodes", lambda need: {"near", "far"})
    monkeypatch.setattr(Finding, "_started", lambda self, node: pytest.fail("it hires"))
    monkeypatch.setattr("ray.wait", lambda calls, **keys: ([], calls))
    work = crew.work(Gaps(listing, [(0, NUM_IMAGES)], 0), folders)
    assert next(work) is None
    answers: Iterator[Any] = iter(
        [
            RayTaskError("do", "", EnvironmentFailed("the disk is full")),
            *((Doubt(attempt), None) for attempt in hands[1].actor.attempts),
        ]
    )

    def get(call: object) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.wait", lambda calls, **keys: (calls[:1], calls[1:]))
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(finding, "GROW_S", 0.0)
    crew.stop()
    assert list(work) == []
    assert [one.node for one in crew._roster.hands] == [NODES[1]]
    assert next(answers, None) is None, "all were heard"
    assert asked == [[{"CPU": 1.0}] * 2, []]
    assert order.said == []

"""Workers lost: what is done about those that fail, die or do not answer, and about their nodes.

A worker is lost when Ray says so, or when it has not answered for a while (its node may be frozen
or cut off, and go on later: what it commits then is committed already, or is as good).
"""

from collections import Counter

from ray.exceptions import OutOfMemoryError, RayError

from batchclf.engines.ray.cluster import named, nodes
from batchclf.engines.ray.dealing import Dealing
from batchclf.engines.ray.finding import Finding
from batchclf.engines.ray.roster import Hand, Lot, Roster
from batchclf.errors import BatchclfError, EnvironmentFailed, WorkerFailed
from batchclf.run.crew import Order

MAX_STILLBORN = 3
"""Workers that die before they are open, after which their node is done without."""
MAX_FAILURES = 3
"""Of workers on a node, one after the other with nothing done: then it is given up."""


class Losing:
    """What becomes of a job whose workers do not do."""

    def __init__(self, order: Order, roster: Roster, finding: Finding, dealing: Dealing) -> None:
        self._order = order
        self._engine = order.job.engine
        self._roster = roster
        self._finding = finding
        self._dealing = dealing
        self._failures: Counter[str] = Counter()
        """Workers that failed one after the other, with nothing done, by their nodes."""
        self._stillborn: Counter[str] = Counter()
        """Workers that died before they were open, by their nodes."""

    def has_done(self, hand: Hand) -> None:
        """A worker did what it was asked for: its node is as it should be."""
        self._failures[hand.node.id] = 0

    def has_failed(self, hand: Hand, error: BatchclfError) -> None:
        """A worker says that it cannot do what it was asked for.

        Raises:
            BatchclfError: nor can the job go on then.
        """
        error = named(error, hand.node)
        is_final = False
        if hand.is_open:
            self.lose(hand, f"failed: {error}", error)
            self._failures[hand.node.id] += 1
            if self._failures[hand.node.id] < MAX_FAILURES:
                return
        else:
            is_final = hand.is_first and not self._engine.allow_fewer
        self._do_without(hand, error, is_final=is_final)

    def is_misled(self, hand: Hand, error: BatchclfError) -> None:
        """A worker does not see what it should: whatever its node says of images cannot be trusted.

        Raises:
            BatchclfError: there is no other node.
        """
        self._do_without(hand, named(error, hand.node), is_final=False)

    def _do_without(self, hand: Hand, error: BatchclfError, *, is_final: bool) -> None:
        """Give a node up."""
        self._finding.bad.add(hand.node.id)
        others = [one for one in self._roster.hands if one.node.id not in self._finding.bad]
        if is_final or not (others or self._finding.rooms()):
            raise error
        self._order.log(f"going on without this node: {error}")
        for one in self._roster.on(hand.node.id):
            self._give_up(one, "is given up with its node")

    def is_gone(self, hand: Hand, error: RayError) -> None:
        """Ray says that a worker is no more.

        Raises:
            BatchclfError: the job cannot go on.
        """
        is_alive = any(node.id == hand.node.id for node in nodes())
        if isinstance(error, OutOfMemoryError):
            self._was_too_large(hand)
            return
        self._stillborn[hand.node.id] += is_alive and not hand.is_open
        if self._stillborn[hand.node.id] == MAX_STILLBORN:  # else its node may be gone as well
            text = str(error).strip().splitlines()
            self.has_failed(
                hand,
                EnvironmentFailed(
                    f"no worker can be started: {text[-1] if text else error!r}; is batchclf "
                    "installed there, as it is here, and is there memory enough?"
                ),
            )
            return
        self.lose(hand, "died" if is_alive else "is gone with its node")

    def _was_too_large(self, hand: Hand) -> None:
        """Ray ended a worker since its node ran out of memory: there are to be fewer from now on.

        Raises:
            EnvironmentFailed: there is memory for none, there or anywhere.
        """
        num_others = len(self._roster.on(hand.node.id)) - 1
        self._finding.crowded[hand.node.id] += num_others > 0
        self.lose(
            hand,
            "was ended by Ray, as memory ran out there (RAY_memory_usage_threshold); "
            + (f"{num_others:,} go on" if num_others else "another one is tried"),
        )
        self._failures[hand.node.id] += 1
        if not num_others and self._failures[hand.node.id] >= MAX_FAILURES:
            error = EnvironmentFailed(
                f"memory does not suffice for one worker: Ray ended {MAX_FAILURES} one after the "
                "other; choose a smaller batch_size, fewer loader.workers, or larger nodes"
            )
            self._do_without(hand, named(error, hand.node), is_final=False)

    def lose(self, hand: Hand, why: str, error: BatchclfError | None = None) -> None:
        """Give a worker up; its ranges are done elsewhere.

        Raises:
            BatchclfError: one of them was lost too often.
        """
        at_work = hand.lots[:1]
        again = self._give_up(hand, why)
        for lot in at_work:
            lot.num_lost += lot in again
            if lot.num_lost > self._engine.max_retries:
                raise error or WorkerFailed(
                    f"{lot.range.name}: {lot.num_lost} workers were lost with them, the "
                    f"last on node {hand.node.name}; look at the nodes' logs, raise "
                    "engine.max_retries, and run the same command to resume"
                )
        self._finding.look_again()

    def _give_up(self, hand: Hand, why: str) -> list[Lot]:
        """End a worker; the ranges that nobody else is at, which are to be done again."""
        again = self._dealing.take_back(hand)
        self._roster.drop(hand)
        self._order.log(
            f"node {hand.node.name}: a worker {why}"
            + (f"; done elsewhere: {', '.join(lot.range.name for lot in again)}" if again else "")
        )
        return again

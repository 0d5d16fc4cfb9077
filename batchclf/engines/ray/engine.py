"""Where a job's run turns to the cluster."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from batchclf.engines.ray.cluster import connected
from batchclf.run.crew import Order

if TYPE_CHECKING:
    from batchclf.engines.ray.crew import RayCrew


def hire(order: Order) -> "RayCrew":
    """Find workers for a job, on a cluster: open and proven.

    Raises:
        UsageError: Ray is not installed, or the job asks for what no node has.
        ProviderError: GPUs are needed and there are none, or the provider does not work on a node.
        EnvironmentFailed: there is no cluster, or the output is not on storage that all reach.
    """
    with ExitStack() as stack:
        stack.enter_context(connected(order.job.engine))
        from batchclf.engines.ray.crew import RayCrew  # late: it imports Ray

        crew = stack.enter_context(RayCrew(order))
        crew.gather()
        crew.keep(stack.pop_all())
    return crew

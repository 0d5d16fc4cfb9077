"""Where a job's run turns to the cluster."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from batchclf.engines.ray.cluster import Connection
from batchclf.run.crew import Order

if TYPE_CHECKING:
    from batchclf.engines.ray.crew import RayCrew


def hire(order: Order) -> "RayCrew":
    """Find workers for a job, on a cluster: open and proven.

    Raises:
        UsageError: Ray is not installed, or the job asks for what no node has.
        ProviderError: GPUs are needed and there are none, or the provider does not work on a node.
        EnvironmentFailed: there is no cluster, or input or output are not what all nodes reach.
    """
    with ExitStack() as stack:
        stack.callback(Connection(order.job.engine).close)
        from batchclf.engines.ray.crew import RayCrew  # late: it imports Ray

        crew = RayCrew(order, stack)
        crew.gather()
        crew.held = stack.pop_all()
    return crew

"""The signals that a worker hears, all of them from its parent."""

import signal

STOP_SIGNALS = {
    signal.SIGRTMIN + 1: signal.SIGINT,
    signal.SIGRTMIN + 2: signal.SIGTERM,
    signal.SIGRTMIN + 3: signal.SIGHUP,
}
"""How the parent passes a signal on. The worker hears no other: a terminal's Ctrl-C goes to both
processes, and would count twice."""
DUMP_SIGNAL = signal.SIGUSR2
"""Has the worker write the stacks of its threads to stderr."""

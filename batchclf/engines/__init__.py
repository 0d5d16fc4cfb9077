"""Where a run goes: `local` is a process of its own that this one watches."""

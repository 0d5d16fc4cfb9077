"""Where a run goes: `local` is a process of its own, watched and started again."""

"""Where a run goes: `local`, a process that is watched and started again; `ray`, many, anywhere."""

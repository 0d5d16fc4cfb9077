"""What people do around a run: look at the machine, check, export, verify."""

"""What people do around a run: doctor, export, validate, verify."""

"""What people do around a run: doctor, export, validate, verify, status, merge, convert, report."""

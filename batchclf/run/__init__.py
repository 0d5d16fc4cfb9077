"""How one run of a job goes; job.py is the file to read first."""

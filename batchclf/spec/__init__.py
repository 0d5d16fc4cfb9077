"""What a job is: its keys, its file, what one run of it is asked."""

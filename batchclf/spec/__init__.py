"""What a job is: its file, its keys, what one run of it is asked."""

"""This machine and the processes on it: cores, memory, paths, children, signals; buckets, text."""

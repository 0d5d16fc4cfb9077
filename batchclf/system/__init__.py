"""This machine and the processes on it: cores, memory, children, signals."""

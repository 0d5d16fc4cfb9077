"""A job's work is done in a child process, which its parent watches, ends and starts again."""

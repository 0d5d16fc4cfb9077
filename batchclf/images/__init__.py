"""From a path to pixels: the input as data (source), where it lies (store), decode, prefetch."""

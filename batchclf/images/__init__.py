"""From an input to pixels: folders, lists, archives, buckets (store), decode, prefetch."""

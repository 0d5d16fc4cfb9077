"""From a path to pixels: listing (source), one file into one slot (decode), batches (prefetch)."""

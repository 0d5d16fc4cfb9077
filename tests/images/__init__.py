"""Tests of the image room: listing, decoding, resampling, prefetching."""

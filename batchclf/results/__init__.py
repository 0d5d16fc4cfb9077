"""From records to durable files: listing, lines, writer, run record, statistics, lock."""

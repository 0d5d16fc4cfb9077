"""From records to durable files: listing, writer, run record, statistics, lock."""

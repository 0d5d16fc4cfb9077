"""From records to durable files (listing, writer, run record, lock), or a bucket (mirror)."""

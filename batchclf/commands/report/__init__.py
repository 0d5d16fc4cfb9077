"""A job's records as one HTML page: what is counted, drawn and shown of them."""

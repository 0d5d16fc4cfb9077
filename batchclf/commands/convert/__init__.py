"""A job's records in another form: CSV, Parquet, or its images in a folder per label."""

"""A job's ranges are classified by workers on the nodes of a Ray cluster, each supervised."""

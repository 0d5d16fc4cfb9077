"""A job's fastest settings: what is measured, predicted, chosen and drawn."""

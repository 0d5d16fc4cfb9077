"""Finding a job's fastest settings: what is measured, predicted, chosen, said and drawn."""

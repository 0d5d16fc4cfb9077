"""The job's provider opened and proven: sessions that give the model's own answers."""

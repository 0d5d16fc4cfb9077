"""Predictions compared with true labels: where these are, which class a name means, figures."""

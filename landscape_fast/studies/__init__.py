"""Experiments: what is trained on which data, and the tables and figures it ends in."""

"""What an ensemble looks like: how its members differ, how its confidence fits, and the figures."""

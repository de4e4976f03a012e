"""Looks and steers: the Python `Client`, the `headwater` command, and starting processes here."""

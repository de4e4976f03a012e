"""The same work by others: `make bench-peers`. Headwater is not installed where they run."""

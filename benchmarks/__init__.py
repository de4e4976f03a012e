"""What `make bench` measures. Not installed."""

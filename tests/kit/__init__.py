"""What the tests share: real processes, a bare protocol-level worker, tasks, a bad network."""

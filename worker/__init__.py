"""A process that takes tickets, computes gradients and pushes them; also `Task`, the user's API."""

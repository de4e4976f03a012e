"""One process that keeps the weights, applies gradients to them and serves them."""

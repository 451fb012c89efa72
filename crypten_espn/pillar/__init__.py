"""Training networks with polynomial activations. Never imports crypten."""

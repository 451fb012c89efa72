"""Private inference with polynomial activations, on CrypTen."""

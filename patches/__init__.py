"""What CrypTen 0.4.1 needs before it works, one file per incompatibility."""

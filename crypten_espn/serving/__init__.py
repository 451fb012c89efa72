"""Sessions over the network: a server, its clients, and their dealer."""

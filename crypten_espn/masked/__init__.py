"""The masked engine: exact private inference with an offline phase."""

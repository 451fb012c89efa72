"""From a converted network to its plan."""

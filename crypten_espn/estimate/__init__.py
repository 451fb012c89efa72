"""What private inference of a network would cost: rounds, bytes, seconds, money.

1. `workload` reads a network: its linear layers, activations and masked plan.
2. `engines` derives rounds, bytes and work of every engine, and seconds on a path.
3. `deployment` projects clients, one server and one dealer; `processor` says what a
   core does in a second; `report` makes tables of it.
"""

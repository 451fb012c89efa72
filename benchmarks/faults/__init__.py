"""Inferences of real processes over mutual TLS, with faults spread over the run.

    python -m benchmarks.faults --inferences 1000 --faults 20

A dealer, a server and clients, each a process of its own that keeps its material on the
disk, are killed, stopped for longer than the time-out and restarted; with --namespaces
(root, Linux) the clients live in a network namespace whose link is also taken down. It
holds if

1. every answer is the network's;
2. no material was used twice: a ledger of (session, number), from what each party logs
   before it uses any, over all the lives of its processes, names none twice, and no
   dealer dealt a number twice;
3. what the client says was answered, the server used the same material for;
4. no call of a client took longer than the waits that it is made of;
5. every failure was one of the package's own errors, and the logs hold no other;
6. the quota's file counts no less than was answered.
"""

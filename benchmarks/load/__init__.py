"""Many clients at once against a real server and dealer: what they wait, what it keeps.

    python -m benchmarks.load --clients 50 --seconds 300

Each client, a thread of a process apart, connects, prepares some inferences, predicts
and leaves, again and again. It holds if

1. nothing fails but by a stated refusal, and every answer is the network's;
2. memory, threads and descriptors of server and dealer are flat after the first part
   of the run, and back near their start after the last client;
3. with 1,000 silent connections to each, a new client is still served, within a second.

`--network` takes what `serve` takes, with `--calibration`; a tiny one by default, so
that what is measured is the service and not the arithmetic.
"""

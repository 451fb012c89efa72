"""Hostile connections against real `crypten-espn serve` and `deal` processes.

    python -m benchmarks.hostile --connections 10000 --json FILE

Over loopback, without certificates: every attack reaches the parsers. Strangers say
nothing, half a greeting, or something else altogether; they mutate messages, take roles
that are not theirs, send a byte now and then, or ask for numbers without end. An honest
client is served all the while. It holds if

1. both processes live, and their logs hold no error that is not the package's own;
2. every stranger that said something whole got an answer, a reason or a closed
   connection, and none was left waiting;
3. the honest client got right answers only;
4. descriptors, threads and memory are back near where they were;
5. SIGTERM ends both with status 0.
"""

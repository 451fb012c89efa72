"""A network path on one machine: real TCP under a set delay and bandwidth.

Every party gets a network namespace of its own with one TUN device in it. A
forwarder process joins the devices: it reads what the kernel's TCP sends, holds
each packet until a line of the set rate would have carried it and the set delay
has passed, and writes it to the receiver's device. What is measured is therefore
the kernel's own TCP: slow start, windows, slow start after idle, acknowledgements.

    with Path("wan") as path:
        results = path.run([[sys.executable, "party.py", "--rank", str(rank),
                             "--server", path.addresses[0]] for rank in range(2)])

What the path does and does not model:
  * Each ordered pair of parties has a pipe of its own, with the set one-way delay
    (half the round trip) and the set rate, counted in bytes of IP packets of at most
    1,500 bytes. TCP payload is 1448/1500 of that.
  * Nothing is lost: the queue before the line holds 64 MiB, more than TCP's windows
    let anyone send. Bulk traffic thus never pays for retransmissions.
  * The kernel hands over up to 64 KiB at a time (segmentation offload), so one Python
    process carries a gigabit; the segments inside still count 1,448 bytes each, in
    the windows as on the line, and arrive together when the last one would.
  * What the forwarder itself needs is measured on entry and taken off the delay, so
    that a one-byte TCP exchange takes the set round trip.
  * Congestion control is cubic, Linux's default, or reno where the kernel lets only
    its first namespace have cubic: on a path without loss they differ little. The
    machine's own choice is not taken: bbr would spread each burst over a round trip.
    All other settings are the kernel's, slow start after idle among them: a
    connection that was silent for about a round trip and 0.2 s starts over with ten
    segments a round trip. `idle_restart=False` turns that off, as an administrator
    can with net.ipv4.tcp_slow_start_after_idle=0, and says so in the label.

Needs root, or a kernel that lets users make namespaces, and /dev/net/tun. No
program is called and no name is given out: namespaces are anonymous and devices
are not persistent, so the kernel removes both when the last process in them ends,
however it ends. Where they cannot be had, entering a Path says what is missing.
"""

from .path import PartyError, PartyResult, Path
from .probe import free_port
from .profile import PROFILES, PathError, Profile
from .selftest import SelfTest, self_test

__all__ = [
    "PROFILES",
    "PartyError",
    "PartyResult",
    "Path",
    "PathError",
    "Profile",
    "SelfTest",
    "free_port",
    "self_test",
]

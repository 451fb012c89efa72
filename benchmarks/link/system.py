"""System calls that Python has no name for: namespaces, TUN devices, interfaces."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8916, 0x891C, 0x8922
SIOCSIFTXQLEN = 0x8943

DEVICE = "path0"
MTU = 1500
CONGESTION_CONTROL = ("cubic", "reno")

_ROOT = str(Path(__file__).resolve().parents[2])
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from benchmarks.link import worker; sys.exit(worker.main(sys.argv[2:]))"
)


def worker(job: str, *arguments: object) -> list[str]:
    """The command line that does a job of worker.py in a process of its own.

    It needs no package but this one, and runs from any folder.
    """
    given = [str(argument) for argument in arguments]
    return [sys.executable, "-S", "-c", _START, _ROOT, job, *given]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> None:
    if getattr(_libc(), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends."""
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def interface(request: int, name: str, payload: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        packed = struct.pack("16s24s", name.encode(), payload)
        return fcntl.ioctl(handle, request, packed)[16:]


def set_up(name: str) -> None:
    flags = struct.unpack("=h", interface(SIOCGIFFLAGS, name, b"")[:2])[0]
    interface(SIOCSIFFLAGS, name, struct.pack("=h", flags | IFF_UP))


def sysctl(name: str, value: str) -> None:
    with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", "w") as handle:
        handle.write(value)


def new_namespace(address: str, idle_restart: str) -> tuple[int, int]:
    """A namespace with one TUN device: its descriptor and the device's."""
    call("unshare", CLONE_NEWNET)
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(error.errno, f"/dev/net/tun: {error.strerror}") from error
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    sysctl("ipv6/conf/all/disable_ipv6", "1")
    for name in reversed(CONGESTION_CONTROL):  # the last one that is allowed stays
        sysctl("ipv4/tcp_congestion_control", name)
    sysctl("ipv4/tcp_no_metrics_save", "1")
    sysctl("ipv4/tcp_slow_start_after_idle", idle_restart)
    for request, host in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
        packed = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(host))
        interface(request, DEVICE, packed)
    interface(SIOCSIFMTU, DEVICE, struct.pack("=i", MTU))
    with contextlib.suppress(OSError):  # 500 packets do, where only root may ask
        interface(SIOCSIFTXQLEN, DEVICE, struct.pack("=i", 10_000))
    set_up("lo")
    set_up(DEVICE)
    return namespace, device


def new_user_namespace() -> None:
    """Root in a namespace of its own, for users who are not root outside."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


def enter_main(parent: int, user: str, network: str, command: list[str]) -> int:
    """Become `command` inside the namespaces behind the given paths."""
    die_with_parent(parent)
    for path, kind in ((user, CLONE_NEWUSER), (network, CLONE_NEWNET)):
        if path != "-":
            descriptor = os.open(path, os.O_RDONLY)
            call("setns", descriptor, kind)
            os.close(descriptor)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
    return 127

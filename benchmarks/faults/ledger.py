"""What the parties' logs say was used, dealt and answered, over all their lives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Use = tuple[str, int]


class Ledger:
    """Material numbers from JSON logs.

    Args:
        logs: by party, the log of each of its lives.
    """

    def __init__(self, logs: dict[str, list[Path]]) -> None:
        self.foreign: list[str] = []
        self._lines = {
            party: list(self._read(party, paths)) for party, paths in logs.items()
        }

    def _read(self, party: str, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            for text in path.read_text(errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    self.foreign.append(f"{party}: {text[:200]}")
                    continue
                if line["level"] not in ("INFO", "WARNING"):
                    self.foreign.append(f"{party}: {text[:400]}")
                yield line

    def of(self, party: str, event: str) -> list[dict[str, Any]]:
        """A party's events of one kind."""
        return [line for line in self._lines[party] if line["event"] == event]

    def uses(self, party: str, event: str = "inference_begun") -> Counter[Use]:
        """How often each number was claimed, or answered."""
        return Counter((u["session"], u["index"]) for u in self.of(party, event))

    @property
    def faults(self) -> list[str]:
        """Numbers that were used or dealt twice, or answered with others' material."""
        found = [f"in a log: {text}" for text in self.foreign]
        for party in ("serve", "client"):
            twice = [use for use, count in self.uses(party).items() if count > 1]
            found += [f"{party} used {use} twice" for use in twice]
        dealt: Counter[Use] = Counter()
        for order in self.of("deal", "dealt"):
            numbers = range(order["start"], order["start"] + order["count"])
            dealt.update((order["session"], number) for number in numbers)
        found += [f"{use} was dealt twice" for use, n in dealt.items() if n > 1]
        answered, served = self.uses("client", "inference"), self.uses("serve")
        found += [f"the server never used {u}" for u in answered if u not in served]
        return found

"""Counts what could not be read during a run, and compares it with the accepted share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_FEW_PICTURES, _FEW_SCENES = 100, 20  # too few to tell a bad source from chance


class SkippedReport:
    """Pictures and scenes that were skipped, over all added batches.

    Args:
        max_bad_share: Share of pictures (and of scenes that can't be read at all) that may be bad, 0..1. None: no
            limit.
    """

    def __init__(self, max_bad_share: float | None = None):
        self.max_bad_share = max_bad_share
        self.pictures_tried = self.pictures_bad = self.scenes_tried = self.scenes_bad = 0
        self._reasons: dict[tuple[str, str, str], str] = {}
        self._times: dict[tuple[str, str, str], int] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch of :class:`~spa3r.data.SceneBatches`.

        Raises:
            RuntimeError: The bad share exceeds `max_bad_share` by more than chance (four standard deviations).
        """
        self.count(batch["skipped"], batch["num_pictures"], len(batch["scenes"]))

    def count(self, skipped: Iterable[Mapping[str, str]], num_pictures: int, num_scenes: int) -> None:
        """As :meth:`add`, from the parts: skipped entries, pictures tried in readable scenes, readable scenes."""
        for entry in skipped:
            key = (entry["source"], entry["scene"], entry["picture"])
            self._reasons[key] = entry["reason"]
            self._times[key] = self._times.get(key, 0) + 1
            if entry["picture"]:
                self.pictures_bad += 1
            else:
                self.scenes_bad += 1
                self.scenes_tried += 1
        self.pictures_tried += num_pictures
        self.scenes_tried += num_scenes
        if self.max_bad_share is not None:
            self._check(self.max_bad_share, "pictures", self.pictures_bad, self.pictures_tried, _FEW_PICTURES)
            self._check(self.max_bad_share, "scenes", self.scenes_bad, self.scenes_tried, _FEW_SCENES)

    def _check(self, share: float, what: str, bad: int, tried: int, few: int) -> None:
        chance = 4 * (share * (1 - share) * tried) ** 0.5
        if bad > share * tried + chance and (tried >= few or share == 0):
            raise RuntimeError(
                f"`max_bad_share` = {share} of the {what} may be bad, got {bad} of {tried} ({bad / tried:.1%}). Repair "
                f"or remove them, or accept more with a larger `max_bad_share`.\n{self}"
            )

    def counts(self) -> dict[str, Any]:
        """All that was counted, for :meth:`count_again`: ``entries``, ``pictures`` and readable ``scenes``."""
        readable = self.scenes_tried - self.scenes_bad
        return {"entries": self.entries(), "pictures": self.pictures_tried, "scenes": readable}

    def count_again(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of another report, or of an earlier part of the run."""
        skipped = [entry for entry in counts["entries"] for _ in range(entry["times"])]
        self.count(skipped, counts["pictures"], counts["scenes"])

    def entries(self) -> list[dict[str, Any]]:
        """Skipped items, each listed once: source, scene, picture ("" for a whole scene), reason, times."""
        return [
            dict(zip(("source", "scene", "picture"), key)) | {"reason": reason, "times": self._times[key]}
            for key, reason in sorted(self._reasons.items())
        ]

    def __str__(self) -> str:
        """Counts, and a line per picture or scene, at most 50."""
        if not self._reasons:
            return f"Nothing was skipped: {self.pictures_tried} pictures of {self.scenes_tried} scenes were read."
        lines = [
            f"Skipped: {self.pictures_bad} of {self.pictures_tried} pictures tried, "
            f"{self.scenes_bad} of {self.scenes_tried} scenes."
        ]
        entries = self.entries()
        for entry in entries[:50]:
            what = "/".join(entry[key] for key in ("source", "scene", "picture") if entry[key])
            times = f", {entry['times']} times" if entry["times"] > 1 else ""
            lines.append(f"  {what}{times}: {entry['reason']}")
        if len(entries) > 50:
            lines.append(f"  and {len(entries) - 50} more")
        return "\n".join(lines)

"""Colours that readers with any colour vision tell apart, for white and for dark paper; shapes say the same again."""

from __future__ import annotations

# Found by a search from Okabe and Ito's colours: as far apart for protanopes and deuteranopes as for others.
LIGHT = ("#005EE9", "#CA6C00", "#1E8747", "#D54091", "#811700", "#4F7CD3", "#6D0890", "#312943")
DARK = ("#71AFFF", "#FF822F", "#00DCB2", "#D342B8", "#F2FF49", "#B6FDFF", "#C745FD", "#64736C")
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#14171c"


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours written as #rrggbb, from 1 to 21 (WCAG 2.2)."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

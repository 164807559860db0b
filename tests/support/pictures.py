"""What pictures are checked against: their size, and colours as colour-blind people see them."""

from __future__ import annotations

from minivllm.viz import palette
from minivllm.viz.figure import Figure

MAX_PNG_BYTES = 60_000
# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
BLINDNESS = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def seen(color: str, kind: str | None) -> tuple[float, float, float]:
    """A colour in CIE L*a*b*, as a person with this kind of colour blindness sees it."""
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in palette.rgb(color)
    ]
    if kind:
        linear = [
            min(1.0, max(0.0, sum(a * x for a, x in zip(row, linear, strict=True))))
            for row in BLINDNESS[kind]
        ]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [
        sum(a * x for a, x in zip(row, linear, strict=True)) / w
        for row, w in zip(to_xyz, white, strict=True)
    ]
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def check_small_and_described(figure: Figure) -> None:
    """A picture of a page is small, and says in words what it shows."""
    data, metadata = figure.mimebundle()
    assert len(figure.to_png()) < MAX_PNG_BYTES
    assert len(figure.alt) > 30
    assert figure.caption.endswith(".")
    assert metadata["image/png"]["alt"] == data["text/plain"] == figure.alt

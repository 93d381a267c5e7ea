"""Which characters and faces there are."""

from __future__ import annotations

from dataclasses import dataclass

from fastsam.longtail.data.glyphs.outlines import Face

_STIX = "STIXGeneral.ttf"


def _files(*names: str) -> tuple[Face, ...]:
    return tuple(Face(name, f"{name}.ttf") for name in names)


@dataclass(frozen=True)
class Alphabet:
    """The classes of a data set, in the order head to tail, and the faces they are drawn in.

    Attributes:
        characters: one for each class.
        faces: faces of all parts but one.
        unseen: faces of the second test set.
    """

    characters: str
    faces: tuple[Face, ...]
    unseen: tuple[Face, ...]


# Each tail class (F Q G) has a look-alike in the head (E O C).
TEN = Alphabet(
    "EOCPURVFQG",
    faces=(
        *_files(
            "DejaVuSans",
            "DejaVuSans-Bold",
            "DejaVuSans-Oblique",
            "DejaVuSans-BoldOblique",
            "DejaVuSansMono",
            "DejaVuSansMono-Oblique",
            "DejaVuSansMono-BoldOblique",
            "DejaVuSerif",
            "DejaVuSerif-Bold",
            "DejaVuSerif-BoldItalic",
            "STIXGeneral",
            "STIXGeneralItalic",
            "STIXGeneralBolIta",
            "cmr10",
            "cmb10",
            "cmss10",
            "cmtt10",
            "cmsy10",
        ),
        Face("STIX script", _STIX, 0x1D49C, (("E", 0x2130), ("F", 0x2131), ("R", 0x211B))),
        Face(
            "STIX double-struck",
            _STIX,
            0x1D538,
            (("C", 0x2102), ("P", 0x2119), ("Q", 0x211A), ("R", 0x211D)),
        ),
        Face("STIX sans", _STIX, 0x1D5A0),
        Face("STIX sans bold", _STIX, 0x1D5D4),
        Face("STIX sans italic", _STIX, 0x1D608),
        Face("STIX monospace", _STIX, 0x1D670),
    ),
    unseen=(
        *_files("DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneralBol", "cmmi10"),
        Face("STIX bold script", _STIX, 0x1D4D0),
        Face("STIX sans bold italic", _STIX, 0x1D63C),
    ),
)

# No two are more alike than E and F, in any two faces or mirrored; a test compares all drawings. The
# classes of the tail are look-alikes of classes of the head, in the same order.
HUNDRED = Alphabet(
    "EYβΨBαPHRGωIXђmbѣA÷@Д7ζK4OΦJLCVQMSTW"  # head
    "29kryΞΣςЖЧЮЂЉЋҐ&#$%*¿±=~Æƈƕʁʞϟϡ©«¤†"  # mid
    "F¥η¶ÐŒpNЛ6ЫɣZɮЩЪЊΔϞ®Ц?ξλÞUæʒ£",  # tail
    faces=_files(
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-BoldItalic",
        "STIXGeneral",
        "STIXGeneralItalic",
        "STIXGeneralBolIta",
    ),
    unseen=_files("DejaVuSerif-Italic", "DejaVuSansMono-Bold", "STIXGeneralBol"),
)

ALPHABETS = {10: TEN, 100: HUNDRED}
"""The alphabets by their number of classes."""

"""Personal data replaced by fixed tokens: datatrove's e-mail and IP, and Portuguese numbers by their check digits."""

from __future__ import annotations

from collections.abc import Callable

from datatrove.data import Document
from datatrove.pipeline.formatters.pii import PIIFormatter, PIIReplacer

from gloria.data.refine.config import PiiConfig

_NIF = r"(?<![\w.,])(?:PT ?)?[1235689]\d{2}[ .]?\d{3}[ .]?\d{3}(?![\w]|[.,]\d)"
_IBAN = r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"
_PHONE = (  # 912 345 678, and 21 234 56 78 of Lisbon and Porto
    r"(?<![\w.,+])(?:\(?(?:\+|00)351\)?[ .-]?)?"
    r"(?:(?:9[1236]|2\d)\d(?:[ .-]?\d{3}){2}|2[12][ .-]\d{3}[ .-]?\d{2}[ .-]?\d{2})(?![\w]|[.,]\d)"
)


def is_nif(text: str) -> bool:
    """Whether the last of nine digits is the check digit of a Portuguese tax number (sum by 9 to 2, modulo 11)."""
    digits = [int(character) for character in text if character.isdigit()]
    check = 11 - sum(digit * weight for digit, weight in zip(digits, range(9, 1, -1))) % 11
    return len(digits) == 9 and digits[8] == (0 if check >= 10 else check)


def is_iban(text: str) -> bool:
    """Whether the check digits of an IBAN are right (ISO 13616: modulo 97 is 1)."""
    bare = text.replace(" ", "")
    if not 15 <= len(bare) <= 34 or (bare.startswith("PT") and len(bare) != 25):
        return False
    return int("".join(str(int(character, 36)) for character in bare[4:] + bare[:4])) % 97 == 1


def replace_private(config: PiiConfig) -> Callable[[Document], str]:
    """The step that replaces what the recipe names, and drops nothing."""
    library = PIIFormatter(config.email, config.ip, email_replacement="<EMAIL>", ip_replacement="<IP>")
    # IBANs go first: in one may be a number that looks like another.
    replacers = [
        PIIReplacer(pattern, token, check)
        for wanted, pattern, token, check in (
            (config.iban, _IBAN, "<IBAN>", is_iban),
            (config.nif, _NIF, "<NIF>", is_nif),
            (config.phone, _PHONE, "<PHONE>", None),
        )
        if wanted
    ]

    def apply(document: Document) -> str:
        text = library.format(document.text)
        for replacer in replacers:
            text = replacer.replace(text)
        document.text = text
        return ""

    return apply

"""English cardinal numbers, spelled as the checkpoints were trained to read them."""

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ("", " thousand", " million", " billion", " trillion")


def _below_thousand(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    rest = number % 100
    return f"{_ONES[number // 100]} hundred" + (f" and {_below_thousand(rest)}" if rest else "")


def number_to_words(number: int) -> str:
    """`number` in English, as num2words writes it.

    21 is "twenty-one", 1100 "one thousand, one hundred", 1001 "one thousand and one".

    Raises:
        ValueError: outside 0 ≤ number < 10¹⁵.
    """
    if not 0 <= number < 10**15:
        raise ValueError(f"{number} is outside 0 ≤ number < 10**15")
    if number < 1000:
        return _below_thousand(number)
    groups = []
    for scale in _SCALES:
        if number == 0:
            break
        number, part = divmod(number, 1000)
        groups.append((part, scale))
    words = ""
    for part, scale in reversed(groups):
        if not part:
            continue
        # A last group below one hundred is joined by "and", every other by a comma.
        joint = "" if not words else (" and " if not scale and part < 100 else ", ")
        words += f"{joint}{_below_thousand(part)}{scale}"
    return words

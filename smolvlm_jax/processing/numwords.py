"""English cardinal numbers, spelled as the checkpoints were trained to read them."""

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))


def number_to_words(number: int) -> str:
    """`number` in English, as num2words writes it.

    21 is "twenty-one", 1100 "one thousand, one hundred", 1001 "one thousand and one".

    Raises:
        ValueError: outside 0 ≤ number < 10¹⁵.
    """
    if not 0 <= number < 10**15:
        raise ValueError(f"{number} is outside 0 ≤ number < 10**15")
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    size, scale = next(entry for entry in _SCALES if number >= entry[0])
    words, rest = f"{number_to_words(number // size)} {scale}", number % size
    if not rest:
        return words
    # A rest below one hundred is joined by "and", every other by a comma.
    return f"{words}{' and ' if rest < 100 else ', '}{number_to_words(rest)}"

"""Dates and times: `2024-02-29`, `March 14th, 2024`, `3:45 pm`, `15:45`."""

import re

NUMERIC = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}")
CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d\d))?(?:\s*:\s*(\d\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
HOUR_OF_24 = re.compile(r"(00?|1[3-9]|2[0-3])\s*:\s*([0-5]\d)(?:\s*:\s*([0-5]\d))?")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY = r"(?P<day>\d{1,2})\s*\^?\s*\{?\s*(?:st|nd|rd|th)?\s*\}?"
YEAR = r"(?:\s*,?\s*(?P<year>\d{4}))?"
SPELT = [re.compile(form, re.IGNORECASE) for form in (rf"{MONTH}\s*{DAY}{YEAR}", rf"{DAY}\s*(?:of\s+)?{MONTH}{YEAR}")]


def read(text: str) -> str | None:
    """Return a date as `2024-02-29`, or `02-29` without a year, and a time as `3:45:00 p`; None if it is neither.

    A time without am or pm is left to its text, unless its hour tells.
    """
    for form in SPELT:
        if found := form.fullmatch(text):
            month = MONTHS.index(found["month"][:3].lower()) + 1
            return "-".join([*([found["year"]] if found["year"] else []), f"{month:02}", f"{int(found['day']):02}"])
    if NUMERIC.fullmatch(text):
        return "-".join(part.zfill(2) for part in re.split("[-/.]", text))
    if found := CLOCK.fullmatch(text):
        hour, minute, second, half = found.groups()
        return f"{int(hour)}:{minute or '00'}:{second or '00'} {half.lower()}"
    if found := HOUR_OF_24.fullmatch(text):
        hour = int(found[1])
        return f"{hour - 12 if hour else 12}:{found[2]}:{found[3] or '00'} {'p' if hour else 'a'}"
    return None

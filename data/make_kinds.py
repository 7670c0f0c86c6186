"""Generate documents of six kinds with the JSON Schema of each: CV, bank statement, lab report, shipping note, e-mail
thread, minutes. They measure what a model makes of schemas that it was not trained on.

A document is drawn as values, then written: fields and tables each in one of several styles, with drawn labels, number
and date formats, order of blocks, and lines that nobody asks for. The JSON is made from the drawn values, never read
back from the text. Validation documents have the schema of their kind. In training documents the names of its keys are
drawn too (employer, company, ...), so that a student has to read the schema that it is shown.

The same seed gives the same bytes on every machine: only random.Random.random() is used, whose sequence Python keeps.

    python -m data.make_kinds --train cv lab_report shipping_note --outdir runs/kinds
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import InputError
from data import idp_invoice
from distil.cli import new_parser, run_script
from distil.files import write_json, write_jsonl

FIRST_DAY, DAYS = datetime.date(2019, 1, 1), 8 * 365
RENAMED = 0.6  # share of the keys with another name in schemas of training documents
MISSING = 0.3  # share of the values that a document may leave out

# ---- words

MONTHS = "January February March April May June July August September October November December"
DATES = (
    "{y}-{m:02}-{d:02}",
    "{d:02}.{m:02}.{y}",
    "{d} {month} {y}",
    "{month} {d}, {y}",
    "{d:02}-{mon}-{y}",
    "{d}/{m}/{y}",
)
MARKS = (".", ",", ",.", ".,", " ,")  # of decimals alone, or of thousands and decimals
NOTHING = ("-", "n/a", "none", "not stated", "--")
FIRST = (
    "Ada Bruno Clara Dmitri Elif Farah Goran Hanna Ines Jonas Kofi Lena Mateo Nadia Olaf Priya Quinn Rosa Sami Tilda"
)
FIRST += " Umar Vera Wim Xenia Yusuf Zoe Arun Berit Carlos Doris Emil Fiona Gita Hugo Irina Jamal Katja Liam Mona Nils"
LAST = "Abel Brandt Costa Dufour Eriksen Farkas Gupta Horvat Ivanov Jansen Keller Lindqvist Moreau Novak Okafor Petrov"
LAST += (
    " Quist Rossi Sato Tanaka Ullmann Varga Weber Xu Yilmaz Zeller Amari Becker Conti Diaz Engel Fischer Gomez Hall"
)
CITIES = {"DE": "Bremen Kassel Ulm", "FR": "Lyon Nantes Rouen", "GB": "Leeds Derby York", "IT": "Turin Bari Padua"}
CITIES |= {"NL": "Utrecht Breda Zwolle", "PL": "Gdansk Lodz Torun", "SE": "Lund Umea Kalmar", "ES": "Vigo Oviedo Lugo"}
COMPANIES = (
    "Alder Beacon Cobalt Dorian Ember Fathom Garnet Harbour Indigo Juniper Kestrel Larch Meridian Nimbus Orchid"
)
TRADES = "Foods Tools Systems Logistics Textiles Energy Labs Print Optics Motors Paper Garden"
FORMS = "Ltd GmbH SA BV AB Inc LLP"
ROLES = "Welder|Data analyst|Nurse|Site manager|Buyer|Pastry chef|Lab technician|Accountant|Web developer|Truck driver"
ROLES += "|Sales assistant|Teacher|Surveyor|Translator|Electrician"
SUBJECTS = "Mechanical engineering|Nursing|Economics|Biology|Graphic design|Law|Logistics|Chemistry|History|Statistics"
SCHOOLS = "University of {}|{} College|Technical School {}|{} Business School"
LANGUAGES = "English|German|French|Spanish|Polish|Arabic|Hindi|Dutch|Turkish|Italian"
LEVELS = {"basic": "basic|beginner|A2", "good": "good|intermediate|B2", "fluent": "fluent|very good|C1"}
LEVELS |= {"native": "native|mother tongue|first language"}
SHOPS = "Corner Bakery|Rail tickets|City pharmacy|Book shop|Fuel station|Grocer Hill|Streaming service|Gym membership"
BOOKINGS = {"card": "card|card payment|POS", "cash": "cash|ATM|cash withdrawal", "fee": "fee|charge|bank fee"}
BOOKINGS |= {"transfer": "transfer|credit transfer|wire"}
TESTS = (  # test, unit, lowest and highest of the range, digits
    ("Haemoglobin", "g/dL", 12.0, 16.0, 1), ("Glucose", "mmol/L", 3.9, 5.6, 1), ("Sodium", "mmol/L", 135, 145, 0),
    ("Potassium", "mmol/L", 3.5, 5.1, 1), ("Creatinine", "umol/L", 50, 98, 0), ("Ferritin", "ng/mL", 15, 150, 0),
    ("TSH", "mU/L", 0.4, 4.0, 2), ("Platelets", "10^9/L", 150, 400, 0), ("Vitamin D", "nmol/L", 50, 125, 0),
    ("Cholesterol", "mmol/L", None, 5.0, 1), ("HDL", "mmol/L", 1.0, None, 2), ("CRP", "mg/L", None, 5.0, 1),
)  # fmt: skip
RATINGS = {"low": "low|L|below range", "normal": "normal|ok|in range", "high": "high|H|above range"}
SEXES = {"female": "female|f|woman", "male": "male|m|man"}
GOODS = "Ceramic tiles|Steel brackets|Olive oil 5 l|Office chairs|Paper rolls|Glass vases|LED panels|Dried herbs"
GOODS += "|Bike frames|Wall paint 10 l|Cotton sheets|Water pumps|Wine glasses|Roof windows"
CARRIERS = "Nordfreight|Swift Parcel|Hanse Cargo|BlueLine Express|TransAlp"
TOPICS = {
    "order": "we would like to order {n} units of {good}|please send us {n} x {good} as usual",
    "complaint": "{n} of the {good} arrived broken|the last delivery of {good} was {n} pieces short",
    "quotation": "what would {n} units of {good} cost us|please quote for {n} {good}",
    "appointment": "can we meet about the {good} at {n} o'clock|may I visit you at {n} o'clock to see the {good}",
}
REPLIES = "Thank you for your message. I will check with the warehouse.|We have seen this and come back to you.|"
REPLIES += "I have asked a colleague. Please be patient.|Noted. You will hear from us.|Let me look into it first."
FILES = "photos.zip|terms.pdf|list.xlsx|drawing.dwg|scan.jpg|contract.docx|plan.pdf|samples.csv"
GROUPS = "Tenants' board|Works council|School association|Sailing club|Project team Atlas|Allotment society"
PLACES = "Room 2.14|Town hall|Canteen|Library, first floor|Video call|Club house"
MATTERS = (
    "New roof|Parking rules|Summer party|Budget|Heating contract|Web site|Playground|Cleaning rota|Noise at night"
)
MATTERS += "|Bicycle shed|Opening hours|Insurance"
TASKS = "ask for three offers|write to the town|update the list|draft a letter|call the insurer|book the hall"
TASKS += "|check the invoice|inform the members|measure the yard"
DECISIONS = {"accepted": "accepted|agreed|carried", "rejected": "rejected|turned down|not carried"}
DECISIONS |= {"postponed": "postponed|adjourned|put off"}
FOOTERS = (
    "Page 1 of 1",
    "Printed without signature",
    "Confidential",
    "Thank you",
    "Created with OfficeSuite 7",
    "* * *",
)


# ---- draws and pages


class Draw(idp_invoice.Draw):
    """Draws with one seeded generator, also from texts between bars."""

    def pick(self, items: Any) -> Any:
        """Draw one of the items, or of the texts between bars."""
        items = items.split("|") if isinstance(items, str) else list(items)
        return items[int(self._random() * len(items))]

    def some(self, items: Any, count: int) -> list:
        """Draw that many different items, in random order."""
        items = items.split("|") if isinstance(items, str) else list(items)
        return [items.pop(int(self._random() * len(items))) for _ in range(count)]

    def maybe(self, value: Any) -> Any:
        """Return the value, or None for one that the document leaves out."""
        return None if self.chance(MISSING) else value

    def person(self) -> str:
        """Draw a full name."""
        return f"{self.pick(FIRST.split())} {self.pick(LAST.split())}"

    def company(self) -> str:
        """Draw the name of a company."""
        return f"{self.pick(COMPANIES.split())} {self.pick(TRADES.split())} {self.pick(FORMS.split())}"

    def day(self, first: datetime.date = FIRST_DAY, days: int = DAYS) -> datetime.date:
        """Draw a day from `first`, within that number of days."""
        return first + datetime.timedelta(days=self.whole(0, days - 1))


def _aligned(rows: list[list[str]], gap: int = 2) -> list[str]:
    widths = [max(len(cell) for cell in column) + gap for column in zip(*rows, strict=True)]
    return ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _listed(heads: list[str], row: list[str], between: str) -> str:
    return between.join(f"{head}: {cell}" for head, cell in zip(heads, row, strict=True))


PAIRS: tuple[Callable[[list[list[str]]], list[str]], ...] = (  # of (label, value)
    lambda pairs: [f"{label}: {value}" for label, value in pairs],
    lambda pairs: [f"{label.upper()}\n{value}" for label, value in pairs],
    lambda pairs: _aligned(pairs),
    lambda pairs: [f"{label} {'.' * max(2, 22 - len(label))} {value}" for label, value in pairs],
    lambda pairs: [" | ".join(f"{label}: {value}" for label, value in pairs)],
    lambda pairs: [f"- {label} = {value}" for label, value in pairs],
)
TABLES: tuple[Callable[[list[str], list[list[str]]], list[str]], ...] = (
    lambda heads, rows: _aligned([heads, *rows]),
    lambda heads, rows: [" | ".join(row) for row in (heads, *rows)],
    lambda heads, rows: [";".join(row) for row in (heads, *rows)],
    lambda heads, rows: [f"{i}. {_listed(heads, row, ', ')}" for i, row in enumerate(rows, 1)],
    lambda heads, rows: [_listed(heads, row, "\n") for row in rows],
    lambda heads, rows: _aligned(rows, 3),
)


@dataclass
class Page:
    """One document while it is written: all of its dates and numbers are in one style."""

    draw: Draw
    blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        pick = self.draw.pick
        self.dates, self.marks, self.nothing = pick(DATES), pick(MARKS), pick(NOTHING)
        self.as_pairs, self.as_table = pick(PAIRS), pick(TABLES)

    def date(self, day: datetime.date | None) -> str | None:
        """Return a day in the document's style."""
        month = MONTHS.split()[day.month - 1] if day else ""
        return day and self.dates.format(d=day.day, m=day.month, y=day.year, month=month, mon=month[:3])

    def number(self, value: float | None, digits: int = 2) -> str | None:
        """Return a number in the document's style."""
        thousands, decimals = self.marks if len(self.marks) == 2 else ("", self.marks)
        signs = {",": thousands, ".": decimals}
        return None if value is None else "".join(signs.get(sign, sign) for sign in f"{value:,.{digits}f}")

    def title(self, texts: str) -> None:
        """Write a heading."""
        text = self.draw.pick(texts)
        self.blocks.append(self.draw.pick((text, text.upper(), f"*** {text} ***", f"# {text}")))

    def pairs(self, *fields: tuple[str, str | None]) -> None:
        """Write labelled values; one that is missing is left out, or its label has a mark."""
        shown = [
            [self.draw.pick(labels), value or self.nothing]
            for labels, value in fields
            if value or self.draw.chance(0.4)
        ]
        self.blocks.append("\n".join(self.as_pairs(shown)))

    def table(self, titles: str, columns: tuple[str, ...], rows: list[tuple[str | None, ...]]) -> None:
        """Write records, under a title where one is drawn."""
        heads, title = [self.draw.pick(labels) for labels in columns], self.draw.pick(titles)
        cells = [[cell or self.nothing for cell in row] for row in rows]
        self.blocks.append("\n".join([title, *self.as_table(heads, cells)] if title else self.as_table(heads, cells)))

    def finish(self, fixed: int = 1) -> str:
        """Return the document. The first blocks stay where they are, `fixed` of them; the others come in any order."""
        blocks = [*self.blocks[:fixed], *self.draw.some(self.blocks[fixed:], len(self.blocks) - fixed)]
        blocks += [self.draw.pick(FOOTERS)] if self.draw.chance(0.4) else []
        return self.draw.pick(("\n", "\n\n")).join(blocks)


# ---- schemas


def thing(about: str = "", **properties: dict) -> dict:
    """Return the schema of an object, all of whose keys are required."""
    part = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"description": about} | part if about else part


def text(about: str = "") -> dict:
    """Return the schema of a short text."""
    return {"type": "string", "minLength": 1, "maxLength": 80} | ({"description": about} if about else {})


def listed(items: dict, about: str = "") -> dict:
    """Return the schema of a short list."""
    return {"type": "array", "items": items, "maxItems": 8} | ({"description": about} if about else {})


def or_null(part: dict) -> dict:
    """Return the schema of a value that may be missing, as people write it."""
    if "type" in part and "enum" not in part:
        return part | {"type": [part["type"], "null"]}
    return {"anyOf": [part, {"type": "null"}]}


def ref(name: str, about: str = "") -> dict:
    """Return a reference to a definition."""
    return {"$ref": f"#/$defs/{name}"} | ({"description": about} if about else {})


DATE = {"type": "string", "format": "date"}
NUMBER, WHOLE, FLAG = {"type": "number"}, {"type": "integer"}, {"type": "boolean"}


def one_of(choices: Any) -> dict:
    """Return the schema of a fixed list of texts."""
    return {"type": "string", "enum": [*choices]}


# ---- the kinds: a schema, and a function that draws (document, answer)

OTHER_NAMES = {  # that keys may have in schemas of training documents
    "name": "full_name|person|called", "email": "mail|email_address", "jobs": "positions|experience|career",
    "role": "job_title|position|occupation", "employer": "company|organisation|firm", "start_year": "since|first_year",
    "end_year": "until|last_year", "languages": "spoken_languages|tongues", "language": "tongue|which",
    "level": "proficiency|skill", "education": "degree|studies", "field": "field_of_study|studied",
    "school": "institution|place_of_study", "year": "graduated|year_of_degree",
    "holder": "account_holder|owner|customer", "iban": "account|account_number", "currency": "unit|money",
    "closing_date": "statement_date|date_of_balance", "closing_balance": "new_balance|final_balance",
    "opening_balance": "old_balance|previous_balance", "bookings": "transactions|entries|movements",
    "booking_date": "date|value_date", "details": "description|purpose|memo", "amount": "sum|value",
    "kind": "type|category", "patient": "person_tested|subject_of_test", "birth_date": "date_of_birth|born_date",
    "sex": "gender", "sample_date": "collection_date|date_taken", "doctor": "physician|requested_by",
    "results": "measurements|values|tests", "test": "analyte|parameter|item", "value": "result|measured",
    "low": "lower_limit|minimum|from", "high": "upper_limit|maximum|to", "rating": "flag|assessment|status",
    "number": "note_number|shipment|id", "ship_date": "dispatch_date|date_sent", "carrier": "forwarder|haulier",
    "terms": "incoterm|delivery_terms", "sender": "from_party|shipper|origin", "recipient": "to_party|consignee",
    "city": "town|location", "country": "country_code|nation", "packages": "goods|lines|parcels",
    "content": "goods_description|article|product", "quantity": "pieces|count|qty", "weight_kg": "kg|gross_weight",
    "fragile": "handle_with_care|breakable", "topic": "matter|concern", "reference": "order_number|case",
    "messages": "mails|posts", "author": "writer|from_person", "sent_date": "date|date_of_mail",
    "attachments": "files|attached",
    "reply_due_date": "deadline_date|answer_by_date", "group": "committee|body|meeting_of",
    "meeting_date": "date|date_held", "place": "venue|room", "chair": "chairperson|led_by",
    "present": "attendees|participants", "items": "agenda|points", "decision": "outcome|vote",
    "actions": "to_do|follow_up", "owner": "responsible|who", "task": "action|what",
    "due_date": "by_date|deadline_date",
}  # fmt: skip


CV = {"title": "CV"} | thing(
    name=text(),
    email=or_null(text()),
    jobs=listed(ref("job"), "as the document lists them"),
    education=or_null(ref("education")),
    languages=listed(thing(language=text(), level=ref("level"))),
)
CV["$defs"] = {
    "job": thing(
        role=text(), employer=text(), start_year=WHOLE, end_year=or_null(WHOLE | {"description": "null: still there"})
    ),
    "education": thing(field=text(), school=text(), year=WHOLE),
    "level": one_of(LEVELS),
}


def cv(draw: Draw, page: Page) -> dict:
    name, year = draw.person(), draw.whole(2019, 2025)
    answer: dict = {"name": name, "email": draw.maybe(f"{name.split()[0].lower()}{draw.whole(1, 99)}@mail.example")}
    jobs, end = [], None if draw.chance(0.5) else year
    for role in draw.some(ROLES, draw.whole(1, 3)):
        start = (end or year) - draw.whole(1, 6)
        jobs.append({"role": role, "employer": draw.company(), "start_year": start, "end_year": end})
        end = start
    cities = [city for names in CITIES.values() for city in names.split()]
    school = draw.pick(SCHOOLS).format(draw.pick(cities))
    education = draw.maybe({"field": draw.pick(SUBJECTS), "school": school, "year": end})
    names = draw.some(LANGUAGES, draw.whole(1, 3))
    languages = [{"language": one, "level": draw.pick(LEVELS)} for one in names]
    page.title("Curriculum vitae|CV|Resume|Application: personal record|About me")
    page.pairs(("Name|Applicant|Full name", name), ("E-mail|Mail|Contact", answer["email"]))
    now = draw.pick("today|present|now")
    rows = [(job["role"], job["employer"], f"{job['start_year']} - {job['end_year'] or now}") for job in jobs]
    page.table("Experience|Work|Career|", ("Role|Position|Job", "Employer|Company|At", "Years|Period|When"), rows)
    if education:
        how = "{field}, {school}, {year}|{year}: {field} at {school}|Degree in {field} ({school}, {year})"
        page.blocks.append(draw.pick(how).format(**education))
    spoken = [f"{one['language']} ({draw.pick(LEVELS[one['level']])})" for one in languages]
    page.blocks.append(draw.pick("Languages: |I speak |Spoken: ") + ", ".join(spoken))
    return answer | {"jobs": jobs, "education": education, "languages": languages}


BANK_STATEMENT = {"title": "Bank statement"} | thing(
    holder=text("whose account it is"),
    iban=text(),
    currency=one_of(("EUR", "GBP", "CHF", "SEK", "PLN")),
    opening_balance=or_null(NUMBER),
    bookings=listed(ref("booking")),
    closing_balance=NUMBER,
    closing_date=DATE,
)
BANK_STATEMENT["$defs"] = {
    "booking": thing(
        booking_date=DATE,
        details=text(),
        kind=ref("kind"),
        amount=NUMBER | {"description": "below 0 where money leaves the account"},
    ),
    "kind": one_of(BOOKINGS),
}


def bank_statement(draw: Draw, page: Page) -> dict:
    day, opening = draw.day(), draw.whole(20000, 900000)
    iban = f"{draw.pick(CITIES)}{draw.whole(10, 99)} " + " ".join(f"{draw.whole(0, 9999):04}" for _ in range(4))
    answer: dict = {"holder": draw.pick((draw.person(), draw.company())), "iban": iban}
    answer["currency"] = draw.pick(BANK_STATEMENT["properties"]["currency"]["enum"])
    bookings, rows, total, closing = [], [], opening, day
    minus, sign = draw.pick((("-", ""), ("-", "+"))), draw.chance(0.3)
    for kind in draw.some([*BOOKINGS, *BOOKINGS], draw.whole(2, 4)):
        details = {"cash": draw.pick(("Station", "Market square")), "fee": draw.pick(("Account", "Cards"))}
        what = details.get(kind) or (
            draw.pick(SHOPS) if kind == "card" else draw.pick((draw.person(), draw.company()))
        )
        cents = draw.whole(150, 40000) * (1 if kind == "transfer" and draw.chance(0.6) else -1)
        closing = closing + datetime.timedelta(days=draw.whole(0, 5))
        bookings.append({"booking_date": closing, "details": what, "kind": kind, "amount": cents / 100})
        plain = page.number(abs(cents) / 100)
        shown = f"{plain}{minus[0] if cents < 0 else minus[1]}" if sign else f"{minus[cents > 0]}{plain}"
        rows.append((page.date(closing), what, draw.pick(BOOKINGS[kind]), shown))
        total += cents
    old = draw.maybe(opening / 100)
    page.title("Bank statement|Account statement|Statement of account|Your account")
    page.pairs(
        ("Account holder|Customer|Holder", answer["holder"]),
        ("IBAN|Account", iban),
        ("Currency|All amounts in", answer["currency"]),
    )
    page.table("Bookings|Transactions|", ("Date|Booked", "Details|Text|Purpose", "Type|Kind", "Amount|Sum"), rows)
    ends = (
        f"Balance on {page.date(closing)}",
        f"New balance ({page.date(closing)})",
        f"Closing balance {page.date(closing)}",
    )
    before = "Old balance|Balance brought forward|Opening balance"
    page.pairs(*([(before, page.number(old))] if old is not None else []), ("|".join(ends), page.number(total / 100)))
    more = {"opening_balance": old, "bookings": bookings, "closing_balance": total / 100, "closing_date": closing}
    return answer | more


LAB_REPORT = {"title": "Lab report"} | thing(
    patient=ref("patient"),
    sample_date=DATE | {"description": "when the sample was taken"},
    doctor=or_null(text("who asked for it")),
    results=listed(ref("result")),
)
LAB_REPORT["$defs"] = {
    "patient": thing(name=text(), birth_date=or_null(DATE), sex=or_null(one_of(SEXES))),
    "limit": or_null(NUMBER),
    "result": thing(
        test=text(),
        value=NUMBER,
        unit=text(),
        low=ref("limit", "lowest normal value"),
        high=ref("limit", "highest normal value"),
        rating=one_of(RATINGS),
    ),
}


def lab_report(draw: Draw, page: Page) -> dict:
    sample, born = draw.day(), draw.day(datetime.date(1940, 1, 1), 65 * 365)
    patient = {"name": draw.person(), "birth_date": draw.maybe(born), "sex": draw.maybe(draw.pick(SEXES))}
    doctor, results, rows = draw.maybe(f"Dr. {draw.person()}"), [], []
    words = {rating: draw.pick(choices) for rating, choices in RATINGS.items()}
    between, below, above = draw.pick(" - |-| to "), draw.pick("< |up to |max. "), draw.pick("> |from |min. ")
    for test, unit, low, high, digits in draw.some(TESTS, draw.whole(2, 4)):
        rating = draw.pick([one for one, limit in (("low", low), ("normal", 1), ("high", high)) if limit is not None])
        least, most = low or 0.3 * (high or 0), high or 2 * (low or 0)
        ends = {"low": (0.5 * least, 0.95 * least), "normal": (least, most), "high": (1.1 * most, 1.8 * most)}[rating]
        steps = [round(end * 10**digits) for end in ends]
        value = draw.whole(steps[0] + 1, max(steps[0] + 1, steps[1] - 1)) / 10**digits
        limits = [page.number(limit, digits) for limit in (low, high)]
        span = between.join(limits) if None not in limits else above + limits[0] if limits[0] else below + limits[1]
        rows.append((test, page.number(value, digits), unit, span, words[rating]))
        results.append({"test": test, "value": value, "unit": unit, "low": low, "high": high, "rating": rating})
    page.title("Lab report|Laboratory results|Findings|Blood test")
    sex = patient["sex"] and draw.pick(SEXES[patient["sex"]])
    page.pairs(
        ("Patient|Name", patient["name"]),
        ("Born|Date of birth|DOB", page.date(patient["birth_date"])),
        ("Sex|Gender", sex),
    )
    page.pairs(("Sample taken|Collected|Sample of", page.date(sample)), ("Requested by|Physician|Doctor", doctor))
    heads = ("Test|Parameter|Analyte", "Result|Value", "Unit|Units", "Range|Normal|Reference", "Flag|Remark|Rating")
    page.table("Results|Values|", heads, rows)
    return {"patient": patient, "sample_date": sample, "doctor": doctor, "results": results}


SHIPPING_NOTE = {"title": "Shipping note"} | thing(
    number=text(),
    ship_date=DATE,
    carrier=or_null(text()),
    terms=or_null(one_of(("EXW", "FCA", "DAP", "DDP"))),
    sender=ref("party"),
    recipient=ref("party"),
    packages=listed(ref("package")),
)
SHIPPING_NOTE["$defs"] = {
    "party": thing(name=text(), city=text(), country=one_of(CITIES)),
    "package": thing(
        content=text(), quantity=WHOLE, weight_kg=or_null(NUMBER), fragile=FLAG | {"description": "as the note says"}
    ),
}


def shipping_note(draw: Draw, page: Page) -> dict:
    parties = []
    for country in draw.some(CITIES, 2):
        parties.append({"name": draw.company(), "city": draw.pick(CITIES[country].split()), "country": country})
    answer: dict = {"number": draw.pick(("SN-{}", "{}", "LS/{}", "DN{}A")).format(draw.whole(1000, 99999))}
    answer |= {"ship_date": draw.day(), "carrier": draw.maybe(draw.pick(CARRIERS))}
    answer |= {
        "terms": draw.maybe(draw.pick(("EXW", "FCA", "DAP", "DDP"))),
        "sender": parties[0],
        "recipient": parties[1],
    }
    packages, rows, care = [], [], draw.pick("fragile|handle with care|breakable")
    for content in draw.some(GOODS, draw.whole(1, 4)):
        kg = draw.maybe(draw.whole(5, 4000) / 10)
        packages.append(
            {"content": content, "quantity": draw.whole(1, 60), "weight_kg": kg, "fragile": draw.chance(0.3)}
        )
        weight = None if kg is None else f"{page.number(kg, 1)} kg"
        rows.append((content, str(packages[-1]["quantity"]), weight, care if packages[-1]["fragile"] else ""))
    page.title("Shipping note|Delivery note|Packing slip|Dispatch advice")
    page.pairs(
        ("No.|Number|Shipment|Note no.", answer["number"]),
        ("Date|Shipped on|Dispatched", page.date(answer["ship_date"])),
    )
    page.pairs(("Carrier|Forwarder|Sent with", answer["carrier"]), ("Terms|Incoterms|Delivery terms", answer["terms"]))
    for labels, party in (("From|Sender|Shipper", parties[0]), ("To|Consignee|Deliver to", parties[1])):
        how = draw.pick(
            (
                "{label}: {name}, {city} ({country})",
                "{label}\n{name}\n{country}-{city}",
                "{label}: {name}; {city}; {country}",
            )
        )
        page.blocks.append(how.format(label=draw.pick(labels), **party))
    page.table(
        "Packages|Contents|", ("Goods|Content|Item", "Qty|Pieces|Quantity", "Weight|Gross", "Note|Remark"), rows
    )
    return answer | {"packages": packages}


EMAIL_THREAD = {"title": "E-mail thread"} | thing(
    subject=text("without Re:"),
    topic=one_of(TOPICS) | {"description": "what the first message is about"},
    reference=or_null(text()),
    reply_due_date=or_null(DATE),
    messages=listed(ref("message"), "as they stand, from the top"),
)
EMAIL_THREAD["$defs"] = {
    "person": thing(name=text(), email=or_null(text())),
    "message": thing(author=ref("person"), sent_date=DATE, attachments=listed(text())),
}


def email_thread(draw: Draw, page: Page) -> dict:
    topic, good, day = draw.pick(TOPICS), draw.pick(GOODS), draw.day()
    people = []
    for _ in range(2):
        name, company = draw.person(), draw.pick(COMPANIES.split())
        people.append({"name": name, "email": draw.maybe(f"{name.split()[1].lower()}@{company.lower()}.example")})
    reference = draw.maybe(f"{draw.pick(('PO', 'Case', 'Ref'))}-{draw.whole(1000, 9999)}")
    due = draw.maybe(day + datetime.timedelta(days=draw.whole(7, 30)))
    subject = draw.pick(("{}, next month", "{} for the new site", "Question on {}", "{} again")).format(good)
    style, messages, parts = draw.whole(0, 2), [], []
    for number in range(draw.whole(1, 3)):
        sender, files = people[number % 2], draw.some(FILES, draw.pick((0, 0, 1, 2)))
        messages.append({"author": sender, "sent_date": day, "attachments": files})
        who = f"{sender['name']} <{sender['email']}>" if sender["email"] else sender["name"]
        head = (
            f"From: {who}\nDate: {page.date(day)}",
            f"On {page.date(day)} {who} wrote:",
            f"{who}, {page.date(day)}",
        )[style]
        body = draw.pick(REPLIES)
        if number == 0:
            ask = draw.pick(TOPICS[topic]).format(n=draw.whole(2, 17), good=good.lower())
            about = f" Our reference is {reference}." if reference else ""
            until = (
                draw.pick((" Please answer by {}.", " We need your reply until {}.")).format(page.date(due))
                if due
                else ""
            )
            body = f"{draw.pick(('Hello', 'Dear team', 'Good day'))}, {ask}{draw.pick('.|, please.')}{about}{until}"
        attached = [draw.pick("Attachments: |Attached: |Files: ") + ", ".join(files)] if files else []
        parts.append("\n".join([head, body, *attached, *draw.pick(((), (f"Regards, {sender['name'].split()[0]}",)))]))
        day = day + datetime.timedelta(days=draw.whole(0, 3))
    if draw.chance(0.5):  # the newest on top, as mail programs quote
        parts, messages = parts[::-1], messages[::-1]
    page.blocks = [f"Subject: {'Re: ' if len(parts) > 1 else ''}{subject}", draw.pick(("\n---\n", "\n\n")).join(parts)]
    answer = {"subject": subject, "topic": topic, "reference": reference, "reply_due_date": due}
    return answer | {"messages": messages}


MINUTES = {"title": "Minutes"} | thing(
    group=text("who met"),
    meeting_date=DATE,
    place=or_null(text()),
    chair=text(),
    present=listed(text(), "without the chair"),
    items=listed(ref("item"), "points of the agenda"),
)
MINUTES["$defs"] = {
    "action": thing(owner=text(), task=text(), due_date=or_null(DATE)),
    "item": thing(topic=text(), decision=or_null(one_of(DECISIONS)), actions=listed(ref("action"))),
}


def minutes(draw: Draw, page: Page) -> dict:
    day = draw.day()
    people = list(dict.fromkeys(draw.person() for _ in range(draw.whole(3, 5))))
    answer: dict = {"group": draw.pick(GROUPS), "meeting_date": day, "place": draw.maybe(draw.pick(PLACES))}
    answer |= {"chair": people[0], "present": people[1:]}
    items, parts = [], []
    mark = draw.pick(("{n}. {topic}", "Item {n}: {topic}", "{n}) {topic}", "## {topic}"))
    how = draw.pick(("Action: {owner} to {task}{due}", "-> {owner}: {task}{due}", "To do ({owner}): {task}{due}"))
    by = draw.pick((" by {}", " (until {})", ", due {}"))
    for n, topic in enumerate(draw.some(MATTERS, draw.whole(1, 3)), 1):
        decision, actions = draw.maybe(draw.pick(DECISIONS)), []
        for task in draw.some(TASKS, draw.pick((0, 1, 1, 2) if n < 3 else (0, 1))):
            due = draw.maybe(day + datetime.timedelta(days=draw.whole(3, 60)))
            actions.append({"owner": draw.pick(people), "task": task, "due_date": due})
        lines = [mark.format(n=n, topic=topic)]
        lines += (
            [draw.pick(("Decision: {}", "The motion was {}.", "Vote: {}")).format(draw.pick(DECISIONS[decision]))]
            if decision
            else []
        )
        lines += [
            how.format(**one | {"due": by.format(page.date(one["due_date"])) if one["due_date"] else ""})
            for one in actions
        ]
        lines += ["Noted."] if len(lines) == 1 else []
        parts.append("\n".join(lines))
        items.append({"topic": topic, "decision": decision, "actions": actions})
    page.title("Minutes|Minutes of the meeting|Meeting notes|Protocol")
    page.pairs(
        ("Group|Meeting of|Committee", answer["group"]),
        ("Date|Held on", page.date(day)),
        ("Place|Room|Where", answer["place"]),
    )
    page.pairs(("Chair|Chaired by|In the chair", people[0]), ("Present|Also present|Attending", ", ".join(people[1:])))
    page.blocks.append("\n".join(parts))
    return answer | {"items": items}


KINDS: dict[str, tuple[dict, Callable[[Draw, Page], dict], int]] = {  # schema, drawing, blocks that stay first
    "cv": (CV, cv, 2),
    "bank_statement": (BANK_STATEMENT, bank_statement, 1),
    "lab_report": (LAB_REPORT, lab_report, 2),
    "shipping_note": (SHIPPING_NOTE, shipping_note, 2),
    "email_thread": (EMAIL_THREAD, email_thread, 2),
    "minutes": (MINUTES, minutes, 2),
}


# ---- files


def plain(value: Any) -> Any:
    """Return a drawn value as JSON has it: days as texts, whole numbers without a point."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    return int(value) if isinstance(value, float) and value == int(value) else value


def renamed(value: Any, names: dict[str, str], keys: bool) -> Any:
    """Return a schema, or an answer where all `keys` are names, with the other names of keys."""
    if isinstance(value, list):
        return [renamed(part, names, keys) for part in value]
    if not isinstance(value, dict):
        return value
    if keys:
        return {names.get(name, name): renamed(part, names, True) for name, part in value.items()}
    part = {name: renamed(inner, names, False) for name, inner in value.items() if name != "properties"}
    if "properties" in value:
        part["properties"] = {
            names.get(name, name): renamed(p, names, False) for name, p in value["properties"].items()
        }
        part["required"] = [*part["properties"]]
    return {name: part[name] for name in value}  # in the schema's order


def documents(kind: str, seed: str, count: int, rename: bool) -> list[dict]:
    """Return that many different documents of a kind with their answers and schemas."""
    schema, write, fixed = KINDS[kind]
    rows: dict[str, dict] = {}
    for number in itertools.count():
        if len(rows) == count:
            break
        page = Page(draw := Draw(f"{kind} {seed} {number}"))
        answer, form = plain(write(draw, page)), schema
        if rename:
            names = {name: draw.pick(others) for name, others in OTHER_NAMES.items() if draw.chance(RENAMED)}
            answer, form = renamed(answer, names, True), renamed(schema, names, False)
        document = page.finish(fixed)
        rows[document] = {"document": document, "expected": answer, "schema": form, "kind": kind}
    return list(rows.values())


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--train", nargs="*", choices=[*KINDS], default=[*KINDS], help="kinds of train.jsonl (default: all)")
    add("--documents", type=int, default=200, help="training documents of each kind (%(default)s)")
    add("--validation", type=int, default=30, help="validation documents of each kind (%(default)s)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--outdir", type=Path, required=True, help="folder of train.jsonl, validation.jsonl and the six schemas")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.documents < 1 or args.validation < 1:
        raise InputError("--documents and --validation are at least 1")
    args.outdir.mkdir(parents=True, exist_ok=True)
    for kind, (schema, _, _) in KINDS.items():
        write_json(args.outdir / f"{kind}_schema.json", schema)
    train = [row for kind in args.train for row in documents(kind, f"train {args.seed}", args.documents, True)]
    validation = [row for kind in KINDS for row in documents(kind, f"val {args.seed}", args.validation, False)]
    for name, rows in (("train", train), ("validation", validation)):
        write_jsonl(args.outdir / f"{name}.jsonl", rows)
        print(f"wrote {len(rows)} rows to {args.outdir / name}.jsonl", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)

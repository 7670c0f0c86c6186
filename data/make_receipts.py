"""Generate synthetic receipts of Malaysian shops, to train on before the few real ones of SROIE.

A receipt is drawn as such paper is printed, in capitals: seller and address over up to four lines, registration and
GST numbers, items in one or two lines, the total among sums that look alike, one of many date forms. About half have
OCR damage in labels, never in a value. Companies, people and streets are invented (towns and states exist); a match
with an existing one is a coincidence.

Rules: `company` is the seller as printed, without its registration number; where a shop name and a legal form both
head the paper, the one with the legal form. `address` is the seller's, its lines joined by spaces, without a branch in
brackets. `date` is as printed. `total` is what is to be paid, after rounding. The same seed gives the same bytes.

    python -m data.make_receipts --outdir runs
    python idp_prepare.py --src runs/receipts.jsonl --schema data/receipt_schema.json --group company \\
        --val_share 0.05 --outdir runs/synthetic_receipts
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

from common import InputError
from data.idp_invoice import Draw, date_text
from distil.cli import new_parser, run_script
from distil.files import write_jsonl

FIRST_DAY, DAYS = datetime.date(2015, 4, 1), 1600
NOISY = 0.5  # share of receipts with OCR damage
DAMAGE = 0.08  # share of their labels with a wrong or missing character

# Words of one kind are split by |. Names of companies: a stem and mostly a word of the trade.
SYLLABLES = "SENG|HENG|KIM|LEONG|HUAT|WAH|FATT|LIAN|HOCK|TECK|SOON|GUAN|YIK|POH|ENG|CHEONG|TONG|LOK|HUP|SIN|BEE|KOK"
MALAY = "MAJU|SINAR|CAHAYA|MUTIARA|GEMILANG|SERI|BINTANG|SEJATI|MEKAR|WAWASAN|PERMAI|KENCANA|RIMBUN|SELESA|BAHAGIA"
ENGLISH = "SUNRISE|GOLDEN|HAPPY|METRO|PRIMA|CITY|CORNER|OCEAN|LUCKY|GREENLEAF|UNITED|FAMILY|EVERGREEN|QUICK|NEW STAR"
FORMS = "|".join(["SDN BHD"] * 10 + ["SDN. BHD."] * 3 + ["(M) SDN BHD"] * 2 + ["ENTERPRISE"] * 3 + ["TRADING", "S/B"])
PEOPLE = "MEI HUI|AH KEONG|SITI NOR|RAJAN A/L MUTHU|FARID|JESSIE|WEI JIE|NURUL|DEVI|ALVIN|MS TEO|HAFIZ|KUMAR|ADMIN"
# the word before or after a stem: goods with the lowest and the highest price in ringgit
TRADES = {
    "RESTORAN -|- RESTAURANT|- FOOD COURT|KEDAI KOPI -|- KITCHEN|- CAFE": (
        "TEH TARIK 2 3|KOPI O 1 3|NASI GORENG KAMPUNG 7 11|MEE REBUS 5 8|ROTI BAKAR 2 4|AYAM GORENG (2PCS) 6 12|"
        "STEAM FISH 18 45|LIMAU ICE 2 4|MIXED VEG RICE 6 9|SATAY SET A 9 15|100 PLUS 2 4|TAKE AWAY 1 1|KANGKUNG S 8 12"
    ),
    "- HARDWARE|- HARDWARE TRADING|- PAINT & HARDWARE|KEDAI BESI -": (
        'PVC ELBOW 20MM 1 3|HAMMER 16OZ 12 24|DRILL BIT 6MM 4 9|"ACE" PAINT BRUSH 2" 3 7|CABLE TIE (100PCS) 5 9|'
        "WHITE CEMENT 1KG 3 6|PADLOCK 40MM 9 25|SILICONE CLEAR 6 12|WIRE NAIL 2 1/2 4 8|BULB LED 9W 7 15|HOSE CLIP 1 3"
    ),
    "- STATIONERY|- BOOK STORE|- BOOKS & GIFTS|KEDAI BUKU -": (
        "A4 PAPER 80GSM 9 14|GEL PEN 0.5 BLUE 2 4|EXERCISE BOOK F5 1 3|CORRECTION TAPE 3 6|RING FILE 2D 5 9|"
        "PHOTOCOPY A4 1 1|GIFT WRAP 2 3|HIGHLIGHTER SET 6 12|STAPLER NO.10 5 9|CARD HOLDER 3 8|GLUE STICK 21G 2 4"
    ),
    "- MINI MARKET|PASARAYA -|- MART|- SUPERMARKET|- GROCER|PASAR MINI -": (
        "FRESH MILK 1L 6 8|RICE 5KG 22 34|EGGS GRADE B (10S) 4 6|SOY SAUCE 640ML 5 8|COOKING OIL 2KG 11 14|"
        "INSTANT NOODLE 5S 4 6|APPLE FUJI 4S 5 9|DETERGENT 2.2KG 12 21|PLASTIC BAG 1 1|BISCUIT 300G 4 7|SUGAR 1KG 2 3"
    ),
    "- PHARMACY|FARMASI -|KLINIK -|- MEDICAL HALL": (
        "VITAMIN C 1000MG 30S 19 42|PARACETAMOL 10S 4 7|FACE MASK 50S 12 30|COUGH SYRUP 120ML 9 16|PLASTER 20S 4 8|"
        "EYE DROP 10ML 12 24|SHAMPOO 400ML 11 19|CONSULTATION 25 45|HERBAL OIL 56ML 6 10|BABY WIPES 80S 5 9"
    ),
    "- CONFECTIONERY|- CAKE HOUSE|- BAKERY": (
        "BUTTER BUN 2 3|CHOC MOIST CAKE 6 45|EGG TART 2 4|WHOLEMEAL LOAF 3 5|SAUSAGE ROLL 3 4|CURRY PUFF 1 3|SCONE 3 5"
    ),
    "- PETROL STATION|STESEN MINYAK -|- AUTO SERVICE|- TYRE SERVICE": (
        "RON95 20 90|DIESEL 30 120|ENGINE OIL 4L 60 140|WIPER BLADE 15 35|MINERAL WATER 1.5L 2 3|CAR WASH 10 18"
    ),
    "- FASHION|- OPTICAL|- ELECTRICAL|- TELECOMMUNICATION|- HOME DECO": (
        "LADIES BLOUSE L 25 69|SLIPPER 39 12 29|USB CABLE 1M 8 19|TABLE FAN 12IN 59 99|CUSHION COVER 9 19|FRAME 80 99|"
        "PHONE CASE 15 35|TOWEL 70X140 16 29|EXTENSION 3M 18 39|LENS CLEANER 5 9"
    ),
}
TOWNS = (  # town: first digits of its postcodes: state
    "IPOH:31:PERAK|TAIPING:34:PERAK|KLANG:41:SELANGOR|KAJANG:43:SELANGOR|SHAH ALAM:40:SELANGOR D.E.|MELAKA:75:|"
    "PETALING JAYA:46:SELANGOR DARUL EHSAN|RAWANG:48:SELANGOR|KUALA LUMPUR:55:|KUALA LUMPUR:58:WILAYAH PERSEKUTUAN|"
    "MUAR:84:JOHOR|JOHOR BAHRU:80:JOHOR|JOHOR BAHRU:81:JOHOR|BATU PAHAT:83:JOHOR|SEREMBAN:70:N. SEMBILAN|"
    "KUANTAN:25:PAHANG|KUCHING:93:SARAWAK|ALOR SETAR:05:KEDAH|BUTTERWORTH:12:PULAU PINANG"
)
PLANTS = "KENANGA|KERUING|CEMPAKA|MELUR|ANGSANA|TERATAI|SEROJA|KEMBOJA|DAMAR|RAMBAI|SENTUL|JATI|MAWAR|KELAPA|BAYAM"
AREAS = "TAMAN|TMN|TAMAN SRI|TAMAN BUKIT|KAWASAN PERINDUSTRIAN|BANDAR BARU|DESA|KAMPUNG|PUSAT PERNIAGAAN"
TITLES = "TAX INVOICE|TAX INVOICE|TAX INVOICE|SIMPLIFIED TAX INVOICE|INVOICE|-TAX INVOICE-|CASH RECEIPT|CASH BILL"
DATES = ["dd/mm/Y"] * 27 + ["dd-mm-y"] * 6 + ["dd-mm-Y"] * 6 + ["dd/mm/y"] * 5 + ["dd MON Y"] * 4
DATES += ["d/m/Y", "dd MON y", "dd-MON-Y", "dd/MON/Y", "Y-mm-dd", "d/mm/Y", "Ymmdd"]
TOTALS = "TOTAL|TOTAL|TOTAL SALES|TOTAL AMOUNT|GRAND TOTAL|NETT TOTAL|NET TOTAL|TOTAL PAYABLE|TOTAL AMT|AMOUNT DUE"
WITH_GST = (
    "TOTAL (INCLUSIVE OF GST)|TOTAL INCL. GST@6%|TOTAL SALES INCLUSIVE GST @6%|TOTAL INCLUSIVE GST|TOTAL (GST INCL)"
)
ROUNDED = (
    "TOTAL ROUNDED|ROUNDED TOTAL|FINAL TOTAL|TOTAL AFTER ROUNDING|NET TOTAL ROUNDED|TOTAL PAYABLE|TOTAL|AMOUNT DUE"
)
HEADS = (  # of the items, by style
    "DESCRIPTION QTY U.PRICE TOTAL|ITEM QTY PRICE AMOUNT", "ITEM QTY U/P AMOUNT\n(RM) (RM)|CODE/DESC QTY PRICE AMOUNT",
    "ITEM QTY S/PRICE AMOUNT TAX", "DESC/ITEM QTY PRICE AMT(RM)", "QTY DESCRIPTION TOTAL|QTY ITEM TOTAL",
    "DESCRIPTION AMOUNT", "DESCRIPTION|QTY UNIT PRICE AMOUNT",
)  # fmt: skip
SUMMARY = "GST SUMMARY AMOUNT(RM) TAX(RM)|GST SUMMARY\nTAX CODE % AMT(RM) TAX(RM)|GST SUMMARY AMOUNT TAX"
ENDS = (
    "THANK YOU|THANK YOU. PLEASE COME AGAIN|PLEASE COME AGAIN|TERIMA KASIH|TERIMA KASIH SILA DATANG LAGI|E.&.O.E.|"
    "GOODS SOLD ARE NOT RETURNABLE|GOODS SOLD ARE NOT REFUNDABLE OR\nEXCHANGEABLE|*** THANK YOU ***|HAVE A NICE DAY|"
    "EXCHANGE IS ALLOWED WITHIN 7 DAYS\nWITH ORIGINAL RECEIPT\nNO CASH REFUND|FOLLOW US ON FACEBOOK|CUSTOMER COPY|"
    "PLEASE KEEP THIS RECEIPT AS PROOF\nOF PURCHASE|OPENING HOURS\nMON-SAT 9AM - 9PM\nSUN 10AM - 6PM|POWERED BY TILL|"
    "BE OUR MEMBER AND\nENJOY SPECIAL PRICES|RECEIVED ABOVE GOODS IN GOOD ORDER\nAND CONDITION"
)


class Slip:
    """A receipt being printed: its draw, whether labels get damaged, and how it writes money and colons."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.noisy = draw, draw.chance(NOISY)
        self.colon = draw.pick((":", " :", ""))
        self.unit = draw.pick(["RM", "RM ", "$", "RM"] + [""] * 12)

    def pick(self, *words: str) -> str:
        return self.draw.pick("|".join(words).split("|"))

    def digits(self, count: int) -> str:
        return f"{self.draw.whole(10 ** (count - 1), 10**count - 1)}"

    def label(self, text: str) -> str:
        """Return a label as OCR reads it: here and there a letter is missing or wrong, or a space is lost."""
        spots = [i for i, letter in enumerate(text) if i and (letter.isalpha() or letter == " ")]
        if not self.noisy or len(spots) < 3 or not self.draw.chance(DAMAGE):
            return text
        at = self.draw.pick(spots)
        alike = {"O": "0", "I": "1", "S": "5", "E": "F", "U": "V", "N": "M", "T": "I", "A": "4", "C": "G", "G": "6"}
        return text[:at] + ("" if self.draw.chance(0.5) else alike.get(text[at], "")) + text[at + 1 :]

    def pair(self, label: str, value: str) -> str:
        return f"{self.label(label)}{self.colon} {value}".strip()

    def sum(self, label: str, cents: int) -> str:
        return self.pair(label, f"{'' if 'RM' in label or cents < 0 else self.unit}{money(cents)}")


def money(cents: int) -> str:
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02d}"


def company_name(slip: Slip, trade: str) -> str:
    """Return an invented name with a word of the trade or a legal form, mostly with both."""
    kinds = ((SYLLABLES, SYLLABLES), (SYLLABLES, SYLLABLES, SYLLABLES), (MALAY, MALAY), (MALAY, PLANTS), (ENGLISH,))
    stem = " ".join(map(slip.pick, slip.draw.pick((*kinds, (ENGLISH, MALAY), ("A|B|C|H|K|L|P", "&", "D|F|M|S|T|Y")))))
    if slip.draw.chance(0.25):
        return f"{stem} {slip.pick('SDN BHD|SDN BHD|SDN. BHD.|ENTERPRISE')}"
    name = slip.pick(trade).replace("-", stem)
    return f"{name} {slip.pick(FORMS)}" if slip.draw.chance(0.8) else name


def address_lines(slip: Slip) -> list[str]:
    """Return an invented address in one to four lines, some of them with a comma or a full stop at their ends."""
    draw, pick = slip.draw, slip.pick
    a, b = draw.whole(1, 60), draw.whole(1, 40)
    number = pick(
        f"NO.{3 * a}|NO {a}-{b}|LOT {31 * a + b}|NO. {a} & {a + 2}|{a}|LOT PT {9 * a + b}|NO: {a}G|{a}, GROUND FLOOR",
        f"UNIT G-{b}, LEVEL {pick('1|2|3')}",
    )
    plant = pick(PLANTS)
    turn = draw.whole(1, 30)
    name = pick(f"{plant}|{plant} {turn}|{plant} {turn}/{draw.whole(1, 20)}|SS {turn}/{draw.whole(1, 40)}")
    street = f"{number}{pick(', |,| ')}{pick('JALAN|JALAN|JALAN|JLN|LORONG|PERSIARAN|LEBUH')} {name}"
    area = f"{pick(AREAS)} {pick(PLANTS, MALAY)}{pick('||', f' {draw.whole(1, 9)}', f', SEKSYEN {turn}')}"
    town, code, state = pick(TOWNS).split(":")
    post = f"{code}{pick('000|100|200|300|350|400|150')}{pick(' | |, ')}{town}"
    comma, join = pick(",|,|"), pick(", | |,")
    lines = [street, area, post] if draw.chance(0.85) else [street, post]
    if state and draw.chance(0.75):
        lines = [*lines[:-1], f"{post}{join}{state}"] if draw.chance(0.75) else [*lines, state]
    if len(lines) > 2 and draw.chance(0.45):  # the area next to the street or the town
        at = draw.whole(1, 2) if len(street) + len(area) < 40 else 2
        lines[at - 1 : at + 1] = [f"{lines[at - 1]}, {lines[at]}"]
    elif len(street) > 30 and draw.chance(0.5):
        lines[:1] = street.split(", ", 1)
    return [*(line + comma for line in lines[:-1]), lines[-1] + pick("||.")]


def head_lines(slip: Slip, company: str, address: list[str]) -> list[str]:
    """Return the top of the paper: what may come before the company, the company, its numbers and its address."""
    draw, pick = slip.draw, slip.pick
    registration = f"{slip.digits(draw.pick((6, 6, 7)))}-{pick('A|D|H|K|M|P|T|U|V|W|X')}"
    before = draw.pick([[]] * 20 + [[pick(PEOPLE)], [f"({registration})"], [pick("CASH SALE|WELCOME", TITLES)]])
    if re.search(r"BHD|S/B", company) and draw.chance(0.06):  # a shop name above
        before = [f"{pick(ENGLISH)} {pick(PLANTS)}", *([slip.label("OWNED BY:")] if draw.chance(0.4) else [])]
    words = company.split(" ")
    cuts = draw.pick((0,) * 44 + (1,) * 4 + (2,) * 2) if len(words) > 3 else 0
    name = [" ".join(words[:2]), *([words[2]] if cuts > 1 else []), " ".join(words[1 + cuts :])] if cuts else [company]
    luck = draw.whole(0, 99) if registration not in "".join(before) else 99
    form = pick("({})|({})|{}|CO. NO. {}|(CO.REG : {})|COMPANY NO: {}|ROC NO. {}").format(registration)
    name = [*name[:-1], f"{name[-1]} ({registration})"] if luck < 22 else [*name, form] if luck < 65 else name
    contact = [f"({pick(PLANTS)} {pick('MALL|PLAZA|BRANCH')})"] if draw.chance(0.12) else []
    phone, fax = (f"0{draw.whole(3, 9)}-{slip.digits(draw.pick((7, 7, 8)))}" for _ in range(2))
    fax = pick("|", f" {slip.label('FAX')}{slip.colon} {fax}")
    numbers = [slip.pair(pick("TEL|TEL|TEL NO|PHONE|TELEPHONE"), phone + fax)] if draw.chance(0.75) else []
    gst = slip.pair(pick("GST ID|GST REG NO|GST NO|GST ID NO|GST REG. NO"), f"00{slip.digits(10)}")
    numbers += [pick(gst, gst, gst, gst, f"({gst})")] if draw.chance(0.8) else []
    above = [numbers.pop()] if numbers and draw.chance(0.25) else []  # a number between the company and its address
    return [*before, *name, *above, *address, *contact, *(draw.shuffled(numbers) if draw.chance(0.2) else numbers)]


def fact_lines(slip: Slip, date: str) -> list[str]:
    """Return document number, date, time, cashier and the like, in lines of one or two."""
    draw, pick = slip.draw, slip.pick
    number = slip.pair(
        pick("INVOICE NO|DOC NO.|RECEIPT #|INV NO|BILL NO|SLIP NO.|CB#|DOCUMENT NO|ORDER NO"),
        f"{pick('CS|T|A|INV-||||OR|V001-')}{slip.digits(draw.whole(4, 9))}",
    )
    hour, rest = draw.whole(8, 21), f"{draw.whole(0, 59):02d}" + pick(f":{draw.whole(0, 59):02d}|")
    clock = pick(f"{hour:02d}:{rest}", f"{(hour - 1) % 12 + 1}:{rest} {'AP'[hour > 11]}M")
    dated = slip.pair(pick("DATE|DATE|DATE|DATE|DATE|BILL DATE|SALES DATE|INVOICE DATE"), date)
    when = pick(f"{dated} {clock}|{dated} {clock}|{dated}|{date} {clock}|{date} {clock} {slip.digits(4)}")
    both = pick(f"{number} {dated}|{dated} {number}|{number} {date} {clock}|{clock} {slip.digits(6)} {date}")
    lines = [both] if draw.chance(0.35) else draw.pick(([number, when], [number, when], [when, number], [when]))
    cashier = slip.pair(pick("CASHIER|CASHIER|STAFF|SALESPERSON|SERVED BY|USER"), pick(PEOPLE))
    counter = slip.pair(pick("TABLE|COUNTER|TERMINAL|PAX"), slip.digits(2))
    more = [
        cashier,
        cashier,
        counter,
        slip.pair(pick("MEMBER|REF|REMARK"), ""),
        pick("CASH|TAKE AWAY|CASH SALES COUNTER"),
    ]
    for line in draw.shuffled(more)[: draw.pick((0, 1, 1, 2, 3))]:
        lines.insert(draw.whole(0, len(lines)), line)
    return [*lines, slip.pair("PRINTED DATE", f"{date} {clock}")] if draw.chance(0.05) else lines


def item_lines(slip: Slip, trade: str) -> tuple[list[str], int, int]:
    """Return the items under their heads, the number of pieces and the sum in sen."""
    draw, lines, pieces, total = slip.draw, [], 0, 0
    style, tax, coded = draw.whole(0, 6), slip.pick("|| SR| SR| S| ZRL| T"), draw.chance(0.3)
    if draw.chance(0.75):
        lines += [slip.label(line) for line in slip.pick(HEADS[style]).split("\n")]
    for good in draw.shuffled(TRADES[trade].split("|"))[: draw.pick((1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 8))]:
        text, low, high = good.rsplit(" ", 2)
        qty = draw.pick((1, 1, 1, 1, 1, 2, 2, 3, 4, draw.whole(5, 24)))
        price = 100 * draw.whole(int(low), int(high)) + draw.pick((0, 0, 20, 50, 80, 90, 90, 99, draw.whole(0, 99)))
        each, code = money(price), slip.digits(draw.pick((4, 6, 7, 13)))
        name, amount = f"{code} {text}" if coded else text, f"{money(qty * price)}{tax}"
        lines += (
            [name, f"{qty} X {each} {amount}"], [f"{code} {qty} {each} {amount}", text],
            [code, text, f"{qty} {each} {amount}"], [f"{name} {qty} {each} {amount}"], [f"{qty} {name} {amount}"],
            [f"{name} {slip.unit}{amount}", *([f"{qty} @ {each}"] if qty > 1 else [])],
            [name, f"{qty} {slip.pick('PC|UNIT|PCS')} * {each} 0.00 {amount}"],
        )[style]  # fmt: skip
        pieces, total = pieces + qty, total + qty * price
    return lines, pieces, total


def sum_lines(slip: Slip, pieces: int, amount: int) -> tuple[list[str], int]:
    """Return the sums, GST, rounding and payment, and the total to pay in sen."""
    draw, pick = slip.draw, slip.pick
    gst = pick("in|in|in|added|added|none|none")
    tax = (amount * 6 + 50) // 100 if gst == "added" else (amount * 6 + 53) // 106
    gross = amount + tax * (gst == "added")
    rounded, rounding = (gross + 2) // 5 * 5, draw.chance(0.55)
    total = rounded if rounding else gross
    lines = [
        slip.pair(
            pick("TOTAL QTY|TOTAL QUANTITY|ITEM COUNT|NO. OF ITEMS"), f"{pieces}{pick('|', f' {money(amount)}')}"
        )
    ]
    lines = lines if draw.chance(0.4) else []
    if gst == "added" or draw.chance(0.6):
        before = pick("SUB TOTAL|SUB-TOTAL|SUBTOTAL|AMOUNT|TOTAL SALES")
        if gst == "in" and draw.chance(0.35):
            lines.append(slip.sum("TOTAL (EXCLUDING GST)", gross - tax))
        else:
            lines.append(slip.sum(before, amount))
        lines += [slip.sum(pick("DISCOUNT|DISC"), 0)] if draw.chance(0.4) else []
        lines += [slip.sum(pick("GST 6%|GST @6%|TOTAL GST|GST PAYABLE (6%)|ADD GST"), tax)] if gst != "none" else []
    final = (pick(WITH_GST, TOTALS) if gst != "none" else pick(TOTALS)) + pick("||| (RM)| RM")
    adjustment = slip.sum(pick("ROUNDING|ROUNDING ADJ|ROUNDING ADJUSTMENT|ROUND ADJ"), rounded - gross)
    if rounding and (gross != rounded or draw.chance(0.75)):
        last = slip.sum(pick(ROUNDED), rounded) if draw.chance(0.95) else f"RM {money(rounded)}"
        lines += [slip.sum(final, gross), adjustment, last]
    else:
        lines += [*([adjustment] if rounding else []), slip.sum(final, total)]
    unit = draw.pick((1, 1, 1, 1, 1, 100, 1000, 5000))
    cash = -(-total // unit) * unit
    if draw.chance(0.75):
        lines.append(slip.sum(pick("CASH|CASH|CASH|CASH RECEIVED|PAYMENT|PAID"), cash))
        lines += [slip.sum(pick("CHANGE|CHANGE|CHANGE DUE"), cash - total)] if draw.chance(0.9) else []
    elif draw.chance(0.7):
        lines.append(slip.sum(pick("VISA|MASTER|CREDIT CARD|DEBIT CARD"), total))
    if gst != "none" and draw.chance(0.9):
        lines += [slip.label(line) for line in pick(SUMMARY).split("\n")]
        lines.append(f"{pick('SR @ 6%|SR (@ 6%)|SR 6|S = 6%')} {money(gross - tax)} {money(tax)}")
        lines += [f"TOTAL{slip.colon} {money(gross - tax)} {money(tax)}"] if draw.chance(0.4) else []
    return lines, total


def receipt(draw: Draw) -> dict:
    """Return a receipt with its answer: {"document", "expected"}."""
    slip, trade = Slip(draw), draw.pick(list(TRADES))
    company, address = company_name(slip, trade), address_lines(slip)
    date = date_text(FIRST_DAY + datetime.timedelta(days=draw.whole(0, DAYS - 1)), draw.pick(DATES), "en")
    facts, title = fact_lines(slip, date), [slip.label(slip.pick(TITLES))] if draw.chance(0.85) else []
    items, pieces, amount = item_lines(slip, trade)
    sums, total = sum_lines(slip, pieces, amount)
    buyer = [slip.label(slip.pick("BILL TO :|CUSTOMER :|SOLD TO:")), company_name(slip, trade), *address_lines(slip)]
    late = draw.chance(0.2)  # number and date below the sums
    ends = [line for end in draw.shuffled(ENDS.split("|"))[: draw.whole(0, 6)] for line in end.split("\n")]
    lines = [*head_lines(slip, company, address), *title, *([] if late else facts)]
    lines += [*(buyer if draw.chance(0.06) else []), *items, *sums, *(facts if late else []), *map(slip.label, ends)]
    if slip.noisy and draw.chance(0.2):
        lines.insert(draw.whole(len(lines) // 2, len(lines)), slip.pick(".|***|-|SR|ORIGINAL|//"))
    expected = {"company": company, "date": date, "address": " ".join(address), "total": total / 100}
    return {"document": "\n".join(lines), "expected": expected}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--outdir", type=Path, required=True, help="folder of receipts.jsonl, which is replaced")
    parser.add_argument("--receipts", type=int, default=2000, help="number of receipts (default: 2000)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.receipts < 1:
        raise InputError(f"--receipts {args.receipts}: at least 1")
    if not args.outdir.is_dir():
        raise InputError(f"--outdir {args.outdir}: no such folder; create it or give another")
    draw = Draw(f"receipts {args.seed}")
    write_jsonl(args.outdir / "receipts.jsonl", [receipt(draw) for _ in range(args.receipts)])
    print(f"wrote {args.receipts} receipts to {args.outdir / 'receipts.jsonl'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)

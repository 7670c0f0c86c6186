"""Write two small tables to try label tasks on: loans.csv, as European spreadsheets write it, and messages.csv.

No row is about a person. A loan's outcome is drawn from a probability that depends on instalment, income, savings,
open loans and work, so no model can be right about all of them. Messages are put together from phrases; some have
typing errors, some mention another concern in passing. The same seed gives the same bytes on every machine.

Example:
  python -m data.make_examples runs/examples
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

from data.make_creditmix import Draw

APPLICANTS, MESSAGES = 600, 800  # of two applications each

# ---- loans: words with what they add to the log-odds of "good"
WORK = {"Nurse": 0.4, "Café owner": -0.5, "Electrician": 0.3, "Teacher": 0.6, "Driver": -0.2, "Student": -0.8}
PURPOSE = {"Car": 0.1, "Kitchen": 0.2, "Holiday": -0.4, "Debt": -0.9, "Tools": 0.4}
LOANS = ["Applicant_ID", "Age", "Occupation", "Monthly_Income", "Savings", "Open_Loans", "Amount", "Months"]
LOANS += ["Purpose", "Outcome"]

# ---- messages: what is asked for, in several wordings
INTENTS = {
    "card_lost": """I lost my card|my card is gone, maybe stolen|someone took my wallet with the card in it
        |I can't find my debit card anywhere|please block my card, I left it on a train|my purse was stolen
        |I dropped my card somewhere in town""",
    "card_not_arrived": """my new card has not come yet|I am still waiting for my card|when will the card be delivered
        |you sent a card two weeks ago and nothing is in my letter box|where is the card I ordered
        |the replacement card never showed up|how long does delivery of a card take""",
    "payment_failed": """my payment was declined|the shop said the card does not work|I could not pay at the till
        |a transfer did not go through|why was my purchase rejected|paying online gives me an error
        |my rent was not sent although there is money on the account""",
    "refund_missing": """the shop promised my money back and I see nothing|when do I get my refund
        |I returned the shoes but was not paid back|my refund is not in the account
        |the merchant says it was returned, it is not here|I cancelled an order and still wait for the money""",
    "wrong_charge": """there is a payment I do not know|I was charged twice|why is there a fee on my statement
        |you took 12 euros from me without a reason|the amount on the bill is not what I paid
        |I see a withdrawal that I never made|my statement shows the same purchase two times""",
    "address_change": """I have moved, please write to my new home|how do I change my address
        |my street has another name now|please update where I live|from May on I live in another town
        |your letters still go to my old flat""",
    "login_problem": """I cannot log in|the app does not take my password|I forgot my passcode
        |my phone is new and the app locks me out|the code you text me never arrives|I am locked out of online banking
        |it says my user name is unknown""",
    "close_account": """I want to leave the bank|please close my account|how can I end my contract
        |I no longer need this account|cancel everything, I am going to another bank
        |what must I do to delete my account""",
}
BEFORE = "|||Hi, |Hello, |Good morning, |Dear team, |Sorry to bother you: |Quick question, |Hey, "
AFTER = "||| Please help.| Thanks!| What now?| Can someone call me?| I need this today.| Kind regards, Kim"
PASSING = {  # another concern that is mentioned and not asked for
    "card_lost": "I was afraid my card was stolen, but I have it",
    "card_not_arrived": "the new card came last week, thanks for that",
    "payment_failed": "a payment was declined in March, that is solved",
    "refund_missing": "the refund I asked about is here now",
    "wrong_charge": "the fee on my statement was explained to me",
    "address_change": "I moved last year and you know the new address",
    "login_problem": "I can log in to the app again",
    "close_account": "I do not want to close my account",
}
VAGUE = {  # short messages that two labels share
    "card": ("card_lost", "card_not_arrived"),
    "money": ("refund_missing", "wrong_charge"),
    "account": ("login_problem", "close_account"),
}


def pick(choices: Any, draw: Draw) -> Any:
    """Return one of the choices, all equally probable."""
    choices = list(choices)
    return choices[int(draw.between(0, len(choices)))]


def comma(number: float) -> str:
    """Return a number as in Germany or Spain: 1.234,50."""
    return f"{number:,.2f}".translate(str.maketrans(",.", ".,"))


def loans(draw: Draw) -> list[list[str]]:
    """Return the rows of loans.csv, two of each applicant."""
    rows = []
    for number in range(APPLICANTS):
        age, work = int(draw.between(19, 70)), pick(WORK, draw)
        income = math.exp(draw.between(math.log(900), math.log(6500)))
        savings, open_loans = draw.between(0, 1) ** 3 * 30000, int(draw.between(0, 1) ** 2 * 5)
        for _ in range(2):
            amount, months = round(draw.between(1000, 20000), -2), pick((12, 24, 36, 48, 60), draw)
            purpose, strain = pick(PURPOSE, draw), amount / months / income
            odds = 2.2 - 6 * strain + savings / 8000 - 0.6 * open_loans + WORK[work] + PURPOSE[purpose]
            outcome = "good" if draw.chance(1 / (1 + math.exp(-1.5 * odds))) else "bad"
            shown = "?" if draw.chance(0.12) else comma(savings)
            row = [f"A{number + 1:04d}", age, work, comma(income), shown, open_loans, comma(amount), months]
            rows.append([str(cell) for cell in [*row, purpose, outcome]])
    return rows


def misspelt(text: str, draw: Draw) -> str:
    """Return the text with two neighbouring letters of about one word in 12 exchanged."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and draw.chance(0.08):
            at = 1 + int(draw.between(0, len(word) - 2))
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def messages(draw: Draw) -> list[list[str]]:
    """Return the rows of messages.csv: text, label."""
    wordings = {label: [one.strip() for one in text.split("|")] for label, text in INTENTS.items()}
    rows = []
    for number in range(MESSAGES):
        label = list(INTENTS)[number % len(INTENTS)]
        text = pick(wordings[label], draw)
        if draw.chance(0.1) and (vague := [word for word, labels in VAGUE.items() if label in labels]):
            text = f"problem with my {vague[0]}"
        elif draw.chance(0.6):
            other = PASSING[pick([name for name in INTENTS if name != label], draw)]
            text = f"{other}. But {text}" if draw.chance(0.5) else f"{text}. By the way, {other}"
        text = misspelt(pick(BEFORE.split("|"), draw) + text + "." + pick(AFTER.split("|"), draw), draw)
        rows.append([text[0].upper() + text[1:], label])
    draw.shuffle(rows)
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write to; files of the same name are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    tables = {"loans.csv": ("cp1252", ";", LOANS, loans), "messages.csv": ("utf-8", ",", ["text", "label"], messages)}
    for name, (encoding, separator, header, make) in tables.items():
        rows = make(Draw(args.seed))
        with open(args.folder / name, "w", encoding=encoding, newline="") as out:
            csv.writer(out, delimiter=separator, lineterminator="\r\n").writerows([header, *rows])
        print(f"wrote {len(rows)} rows to {args.folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

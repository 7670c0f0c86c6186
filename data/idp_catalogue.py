"""Words of the synthetic invoices: countries, vendors, customers, goods and labels. Used by make_idp.py.

Every vendor and customer is invented; a match with the name of a firm is a coincidence. Each distinctive part of a
vendor's name occurs in one vendor alone, so a validation vendor shares with the others no more than words of its trade
("Joinery", "Ltd").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """How a country writes. `language`: of labels and goods; `number`: 1234.5 as printed."""

    currency: str
    language: str
    number: str
    dates: tuple[str, ...]  # styles of make_idp.date_text, the first ones more often
    tax: tuple[str, tuple[str, ...]]  # name on the document, rates in per cent
    forms: tuple[str, ...]  # legal forms, "" for none
    places: tuple[str, ...]
    streets: tuple[str, ...]


COUNTRIES = {
    "US": Country(
        "USD",
        "en",
        "1,234.50",
        ("m/d/Y", "mm/dd/Y", "Month d, Y", "Mon d, Y", "mm/dd/y", "MON d, Y"),
        ("Sales tax", ("4", "5.5", "6", "6.25", "7", "7.25", "8", "8.25")),
        ("Inc.", "LLC", "", "Corp.", ""),
        (
            "Dayton, OH 45402",
            "Boise, ID 83702",
            "Salem, OR 97301",
            "Macon, GA 31201",
            "Duluth, MN 55802",
            "Laredo, TX 78040",
            "Camden, ME 04843",
            "Provo, UT 84601",
        ),
        ("12 Alder St", "480 Pine Ave", "77 Canal Rd", "1504 Lincoln Blvd", "9 Foundry Ct", "231 Ridge Dr"),
    ),
    "GB": Country(
        "GBP",
        "en",
        "1,234.50",
        ("dd/mm/Y", "d Month Y", "d Mon Y", "d-Mon-Y", "dd/mm/y", "dd-mm-Y", "dd MON Y"),
        ("VAT", ("20", "20", "5")),
        ("Ltd", "Limited", "", "LLP", "Ltd"),
        ("Ludlow SY8 1AA", "Whitby YO21 3PU", "Leeds LS2 7EW", "Truro TR1 2NA", "Perth PH1 5TJ", "Hexham NE46 1XQ"),
        ("14 Mill Lane", "3 Chapel Street", "Unit 6 Station Yard", "81 High Street", "22 Quay Road"),
    ),
    "IE": Country(
        "EUR",
        "en",
        "1,234.50",
        ("dd/mm/Y", "d Month Y", "d Mon Y"),
        ("VAT", ("23", "13.5")),
        ("Ltd", "", "DAC"),
        ("Galway", "Sligo", "Kilkenny", "Tralee"),
        ("5 Bridge Street", "Unit 2 Dock Road", "18 Abbey Row"),
    ),
    "CA": Country(
        "CAD",
        "en",
        "1,234.50",
        ("Y-mm-dd", "Month d, Y", "Mon d, Y"),
        ("GST", ("5",)),
        ("Inc.", "Ltd.", ""),
        ("Guelph, ON", "Moncton, NB", "Nelson, BC", "Regina, SK"),
        ("40 Maple Cres", "611 Front St", "8 Harbour Rd"),
    ),
    "AU": Country(
        "AUD",
        "en",
        "1,234.50",
        ("dd/mm/Y", "d Month Y", "d Mon Y"),
        ("GST", ("10",)),
        ("Pty Ltd", ""),
        ("Ballarat VIC", "Orange NSW", "Mackay QLD", "Hobart TAS"),
        ("27 Wattle St", "3 Jetty Rd", "190 Creek Rd"),
    ),
    "DE": Country(
        "EUR",
        "de",
        "1.234,50",
        ("dd.mm.Y", "dd.mm.Y", "d. Month Y", "d.m.Y", "dd.mm.y", "d. Mon Y"),
        ("MwSt", ("19", "19", "7")),
        ("GmbH", "", "GmbH & Co. KG", "e.K.", "OHG"),
        ("34117 Kassel", "79098 Freiburg", "23552 Lübeck", "04109 Leipzig", "97070 Würzburg", "49074 Osnabrück"),
        ("Mühlenweg 3", "Am Anger 12", "Bahnhofstraße 27", "Lindenallee 8", "Hafenstr. 41"),
    ),
    "AT": Country(
        "EUR",
        "de",
        "1.234,50",
        ("dd.mm.Y", "d. Month Y", "d.m.Y"),
        ("USt", ("20", "10")),
        ("GmbH", "", "OG"),
        ("4020 Linz", "8010 Graz", "6020 Innsbruck"),
        ("Marktplatz 4", "Wiener Str. 16", "Feldgasse 9"),
    ),
    "CH": Country(
        "CHF",
        "de",
        "1'234.50",
        ("dd.mm.Y", "d. Month Y", "dd.mm.y"),
        ("MWST", ("8.1", "2.6")),
        ("AG", "GmbH", ""),
        ("8400 Winterthur", "3600 Thun", "7000 Chur"),
        ("Seestrasse 14", "Dorfgasse 2", "Industrieweg 33"),
    ),
    "CHF": Country(  # French-speaking Switzerland
        "CHF",
        "fr",
        "1'234.50",
        ("dd.mm.Y", "d Month Y"),
        ("TVA", ("8.1", "2.6")),
        ("SA", "Sàrl", ""),
        ("2000 Neuchâtel", "1700 Fribourg", "1950 Sion"),
        ("Rue du Lac 7", "Chemin des Vignes 12"),
    ),
    "FR": Country(
        "EUR",
        "fr",
        "1 234,50",
        ("dd/mm/Y", "dd/mm/Y", "d Month Y", "dd.mm.Y", "dd-mm-Y"),
        ("TVA", ("20", "10", "5,5")),
        ("SARL", "SAS", "", "& Fils", "EURL"),
        ("86000 Poitiers", "29000 Quimper", "73000 Chambéry", "64100 Bayonne", "54000 Nancy"),
        ("8 rue des Tanneurs", "15 avenue de la Gare", "3 place du Marché", "42 quai Nord"),
    ),
    "SE": Country(
        "SEK",
        "sv",
        "1 234,50",
        ("Y-mm-dd", "Y-mm-dd", "d Month Y", "d Mon Y"),
        ("Moms", ("25", "12")),
        ("AB", "AB", "HB", ""),
        ("722 11 Västerås", "831 30 Östersund", "392 32 Kalmar"),
        ("Kvarngatan 5", "Storgatan 18", "Hamnvägen 2"),
    ),
    "DK": Country(
        "DKK",
        "en",
        "1.234,50",
        ("dd.mm.Y", "d Month Y", "Y-mm-dd", "dd-mm-Y"),
        ("VAT", ("25",)),
        ("ApS", "A/S", ""),
        ("5000 Odense", "8800 Viborg", "4000 Roskilde"),
        ("Havnegade 11", "Skovvej 24"),
    ),
    "NO": Country(
        "NOK",
        "en",
        "1 234,50",
        ("dd.mm.Y", "d Month Y"),
        ("VAT", ("25", "15")),
        ("AS", "AS", ""),
        ("4006 Stavanger", "7013 Trondheim"),
        ("Fjordveien 9", "Kirkegata 31"),
    ),
    "PL": Country(
        "PLN",
        "en",
        "1 234,50",
        ("dd.mm.Y", "Y-mm-dd", "d Month Y"),
        ("VAT", ("23", "8")),
        ("Sp. z o.o.", "S.A.", ""),
        ("87-100 Toruń", "35-001 Rzeszów"),
        ("ul. Młyńska 6", "ul. Polna 19"),
    ),
}

# What stands for a currency on a document. No mark stands for two currencies: `$` alone is US dollars (others have a
# letter), `kr` is Swedish (Danish and Norwegian documents print the code), `Fr.` is Swiss.
MARKS = {
    "USD": ("$", "$", "$", "USD", "US$"),
    "GBP": ("£", "£", "GBP"),
    "EUR": ("€", "€", "EUR"),
    "CHF": ("CHF", "CHF", "Fr."),
    "CAD": ("C$", "CAD", "CA$"),
    "AUD": ("A$", "AUD", "AU$"),
    "SEK": ("kr", "kr", "SEK"),
    "DKK": ("DKK",),
    "NOK": ("NOK",),
    "PLN": ("zł", "PLN"),
}
PRICE_FACTOR = {"SEK": 10, "DKK": 7, "NOK": 10, "PLN": 4}  # prices below are in euros or dollars

# ---- distinctive parts of vendor names. "A+B" is one vendor "A & B".
STEMS = {
    "US": (
        "Tamarack|Bluestem|Hargrove+Pell|Copper Kettle|Lindqvist Bros.|Oakhaven|Marlow Point|Redfern|"
        "Three Pines|Calloway|Sundial|Pruitt+Dane|Granite Fork|Wexler|Juniper Hill|Ostrander|Silverlake|"
        "Beckett+Lowe|Harvest Moon|Tolliver|Cedar Gap|Nakamura|Prairie Star|Whitcomb|Eastgate|Delacroix|"
        "Stonebridge|Kessler+Ray|Lantern|Abernathy|Pinecrest|Ruiz Family|Northfork|Halloran|Blue Heron|"
        "Maddox+Finch|Summit Trail|Vandermeer|Old Mill|Castellano|Riverbend|Okafor|Cloverdale|Thackeray|"
        "Iron Gate|Yoder|Lakeshore|Pemberly|Sagebrush|Dunmore|High Desert|Fairbanks|Cobalt|Mercado|"
        "Gold Leaf|Trimble"
    ),
    "GB": (
        "Hollis+Wren|Ashdown|Birkett|Thornbury|Pike+Larkin|Fenwick|Greystone|Mottram|Saltmarsh|"
        "Quill+Ivory|Hadley|Bramble|Oxenholme|Tregenza|Carrick|Dovedale|Penhale|Nettlefield|Rook+Tanner|"
        "Kilburnie|Longstaff|Wyvern|Marchbank|Osgood|Swallowtail|Lomax|Beaufort+Kay|Harrowgate|Tidewell|"
        "Priory|Stannard|Elmswood|Caddick|Featherstone|Nightingale|Blackthorn|Gadsby|Winterbourne|"
        "Ruddock|Islay"
    ),
    "IE": "Corrib|Dunleavy|Moylan+Roche|Slieve|Tuohy|Ballymore|Keogh|Shannonside|Fennelly|Glenveagh",
    "CA": (
        "Birchbark|Laurier|Kicking Horse|Tremblay+Ross|Muskoka|Sauvé|Northern Spruce|Chisholm|Fundy|"
        "Pelletier|Loon Bay|McAdam"
    ),
    "AU": (
        "Banksia|Wollombi|Kangaloon|Trewin+Hale|Ironbark|Coorong|Larrakeyah|Bellbird|Sandgate|Murchison|"
        "Yarra Glen|Dempster"
    ),
    "DE": (
        "Brandl|Holtkamp|Siebert+Kruse|Eichinger|Wiesental|Rademacher|Lohmeier|Nordlicht|Pfisterer|"
        "Kallweit|Sonnhof|Dreher+Voss|Hagedorn|Tannenberg|Uhlig|Schimmelpfennig|Kornblum|Westermann|"
        "Möhring|Falkenhain|Zöllner|Buchholz|Grünwald+Beck|Hansmann|Ilmenau|Jürgensen|Kettler|Lindner|"
        "Moorkamp|Nieland|Overbeck|Petermann|Quandt|Rosenhagen|Steinfurth|Thormann|Vollrath|Wagenknecht|"
        "Ziegelhof|Ahlers"
    ),
    "AT": "Leitner|Hochreiter|Pichlmayr|Donauwörth|Steinbacher|Kogler+Maier|Almtal|Unterweger",
    "CH": (
        "Zurbriggen|Aebischer|Bergli|Gantenbein|Hürlimann|Kaltbach|Nägeli+Frei|Rüegg|Stockhorn|Tobler|"
        "Wyss|Zbinden|Inauen|Schwendimann"
    ),
    "CHF": "Jaquet|Bovard|Rochat|Favre+Monod|Chasseral|Perriard|Dubochet|Gruyet",
    "FR": (
        "Lacombe|Bonnefoy|Le Gall|Marchetti|Aubépine|Rousselot|Deschamps+Noël|Fontvieille|Garrigue|"
        "Hervieu|Jolivet|Kerbrat|Lavergne|Montclar|Nivelle|Orsini|Peyronnet|Quesnel|Roquebrune|Santoni|"
        "Tessier|Urbain|Valmont|Vasseur+Petit|Beauchêne|Cassagne|Delorme|Estève|Fournel|Grandpré"
    ),
    "SE": (
        "Ekbergs|Lindgårdens|Norrsken|Öhmans|Sjöviks|Tallbackens|Wallströms|Åkerlunds|Björkhagens|"
        "Dalkvists|Fjällnäs|Granlunds|Hultmans|Isakssons|Kvarnby|Ljungdahls|Mossviks|Rönnbergs|"
        "Skärgårdens|Tornqvists"
    ),
    "DK": "Kjærgaard|Vesterhav|Mortensen+Holm|Lindholt|Bøgely|Skovgaard|Enghave|Thorup|Ravnsborg",
    "NO": "Fjellheim|Nordbø|Solvik|Haugland|Bjørnstad|Tveit+Moe|Kystlykt|Aasgard",
    "PL": "Kowalczyk|Jaskółka|Zielony Dąb|Wiśniewska|Borowik|Nowy Port|Szymański|Lipowa",
}

# ---- trades: patterns of names and goods. A good is (text, lowest price, highest price, kind of quantity):
# n a few pieces, b many pieces, h hours in halves and quarters, k weights or lengths, 1 nearly always one.
# The last good of each trade is sold by validation vendors alone.
# In texts <a|b> is one of a and b, {cm}, {mm}, {kg} and {n} are drawn numbers, {c} is a colour and {m} a month.
TRADES = {
    "en": {
        "joinery": (
            ("{} Joinery", "{} Woodworks", "{} Timber"),
            (
                ("Oak shelf board {cm} cm", 14, 48, "n"),
                ("Pine batten {cm} cm", 2, 9, "b"),
                ("Door hinge, {c}", 3, 12, "n"),
                ("Workbench top {cm} cm", 90, 260, "1"),
                ("Fitting on site", 38, 64, "h"),
                ("Sash window repair", 120, 380, "1"),
                ("Birch plywood {mm} mm", 22, 60, "n"),
                ("Wood glue <1|2|5> l", 6, 19, "n"),
            ),
        ),
        "stationery": (
            ("{} Stationery", "{} Office Supply", "{} Paper"),
            (
                ("Copy paper A4, <250|500> sheets", 4, 9, "b"),
                ("Ring binder {c}", 2, 6, "b"),
                ("Desk lamp", 24, 79, "1"),
                ("Gel pen {c}, box of {n}", 6, 18, "n"),
                ("Toner cartridge {c}", 45, 120, "n"),
                ("Stapler", 8, 22, "n"),
                ("Envelopes C5, pack of <25|50|100>", 5, 15, "n"),
                ("Whiteboard <60|90|120> cm", 35, 140, "1"),
            ),
        ),
        "bakery": (
            ("{} Bakery", "{} Bread", "The {} Oven"),
            (
                ("Sourdough loaf", 4, 8, "n"),
                ("Rye bread {kg} kg", 5, 11, "n"),
                ("Butter croissant", 2, 4, "b"),
                ("Cinnamon roll", 3, 5, "n"),
                ("Carrot cake", 24, 39, "1"),
                ("Flat white", 3, 5, "n"),
                ("Oat cookies, bag of {n}", 4, 9, "n"),
                ("Bread flour", 1, 3, "k"),
            ),
        ),
        "it": (
            ("{} IT Services", "{} Systems", "{} Networks"),
            (
                ("Remote support", 60, 110, "h"),
                ("USB-C dock", 79, 189, "n"),
                ("Managed backup {m}", 25, 90, "1"),
                ("Network cable <1|2|3|5|10> m", 3, 9, "b"),
                ("Laptop stand, {c}", 25, 60, "n"),
                ("Licence renewal", 49, 320, "n"),
                ("Router installation", 90, 180, "1"),
                ("SSD upgrade <250|500|1000> GB", 60, 210, "n"),
            ),
        ),
        "plumbing": (
            ("{} Plumbing", "{} Heating & Plumbing", "{} Pipe Works"),
            (
                ("Labour, plumber", 45, 85, "h"),
                ("Copper pipe <15|22|28> mm", 4, 12, "k"),
                ("Ball valve <15|22|28> mm", 9, 28, "n"),
                ("Boiler service", 85, 160, "1"),
                ("Mixer tap, {c}", 60, 190, "1"),
                ("Call-out charge", 40, 75, "1"),
                ("Radiator <60|80|100|120> cm", 80, 240, "n"),
                ("Pipe insulation", 2, 5, "k"),
            ),
        ),
        "garden": (
            ("{} Landscaping", "{} Garden Care", "{} Nursery"),
            (
                ("Hedge trimming", 30, 55, "h"),
                ("Lawn mowing {m}", 40, 120, "1"),
                ("Compost, <20|40|60> l bag", 5, 12, "b"),
                ("Lavender, tray of <6|10|12>", 4, 9, "b"),
                ("Apple tree <120|150|180> cm", 28, 70, "n"),
                ("Gravel", 30, 60, "k"),
                ("Terracotta pot <14|18|24|30> cm", 8, 35, "n"),
                ("Green waste removal", 45, 130, "1"),
            ),
        ),
        "cleaning": (
            ("{} Cleaning", "{} Facility Services", "{} Window Cleaning"),
            (
                ("Office cleaning {m}", 180, 620, "1"),
                ("Window cleaning", 28, 45, "h"),
                ("Carpet shampoo", 3, 7, "k"),
                ("Hand soap <1|2|5> l", 6, 18, "n"),
                ("Paper towels, <6|12|24> rolls", 9, 26, "n"),
                ("Deep clean, kitchen", 95, 260, "1"),
                ("Bin liners <20|35|60> l", 3, 8, "b"),
            ),
        ),
        "printing": (
            ("{} Print", "{} Press", "{} Signs & Print"),
            (
                ("Business cards, <100|250|500> pcs", 25, 70, "n"),
                ("Flyer A5, <100|250|500|1000> pcs", 40, 140, "1"),
                ("Roller banner <85|100|120> cm", 60, 150, "n"),
                ("Layout work", 45, 80, "h"),
                ("Vinyl sticker <40|60|80> mm", 1, 4, "b"),
                ("Poster A2", 6, 18, "n"),
                ("Booklet, {n} pages", 3, 12, "b"),
            ),
        ),
        "catering": (
            ("{} Catering", "{} Kitchen", "{} Cafe"),
            (
                ("Lunch platter for <4|6|8|10>", 35, 120, "n"),
                ("Soup of the day", 5, 9, "n"),
                ("Service staff", 22, 38, "h"),
                ("Mineral water <0.5|1> l", 1, 4, "b"),
                ("Cheese board", 24, 65, "n"),
                ("Coffee urn hire", 20, 45, "1"),
                ("Veggie burger", 9, 15, "n"),
                ("House lemonade", 3, 6, "n"),
            ),
        ),
        "motor": (
            ("{} Motors", "{} Auto Repair", "{} Tyres"),
            (
                ("Oil change", 49, 95, "1"),
                ("Engine oil", 8, 15, "k"),
                ("Brake pads front", 45, 120, "1"),
                ("Labour, mechanic", 55, 98, "h"),
                ("Winter tyre R<15|16|17|18>", 70, 160, "n"),
                ("Wiper blade <45|50|55|60> cm", 9, 22, "n"),
                ("Air filter", 12, 35, "1"),
                ("Car wash", 10, 25, "1"),
            ),
        ),
        "books": (
            ("{} Books", "{} & Page Booksellers", "{} Music"),
            (
                ("Road atlas", 12, 25, "1"),
                ("Field guide to birds", 14, 32, "n"),
                ("Guitar strings, set of <6|12>", 8, 18, "n"),
                ("Notebook, {c}", 5, 14, "n"),
                ("Wall calendar", 9, 19, "n"),
                ("Piano lesson", 28, 48, "h"),
                ("Used paperback", 2, 6, "b"),
            ),
        ),
        "consulting": (
            ("{} Consulting", "{} Design Studio", "{} Translations"),
            (
                ("Workshop day {m}", 450, 1200, "n"),
                ("Logo design", 320, 900, "1"),
                ("Project management", 75, 140, "h"),
                ("Translation, {n} pages", 60, 380, "1"),
                ("Proofreading", 35, 60, "h"),
                ("Travel expenses {m}", 40, 310, "1"),
                ("Stock photo licence", 10, 45, "n"),
            ),
        ),
        "electrical": (
            ("{} Electrical", "{} Lighting", "{} Power Tools"),
            (
                ("LED bulb <4|7|9|12> W", 3, 9, "b"),
                ("Electrician on site", 48, 88, "h"),
                ("Cable <3G1.5|3G2.5|5G2.5>", 1, 5, "k"),
                ("Socket, {c}", 5, 16, "n"),
                ("Fuse board upgrade", 280, 690, "1"),
                ("Cordless drill <12|18> V", 79, 199, "1"),
                ("Ceiling light <30|40|60> cm", 35, 120, "n"),
            ),
        ),
    },
    "de": {
        "Schreinerei": (
            ("Schreinerei {}", "{} Holzbau", "Tischlerei {}"),
            (
                ("Regalboden Eiche {cm} cm", 14, 48, "n"),
                ("Montage vor Ort", 42, 68, "h"),
                ("Türband {c}", 3, 12, "n"),
                ("Sperrholz Birke {mm} mm", 22, 60, "n"),
                ("Fenster gangbar machen", 90, 260, "1"),
                ("Holzleim {kg} kg", 6, 19, "n"),
                ("Leiste Kiefer", 2, 6, "k"),
            ),
        ),
        "Büro": (
            ("{} Bürobedarf", "Papier {}", "{} Schreibwaren"),
            (
                ("Kopierpapier A4, <250|500> Blatt", 4, 9, "b"),
                ("Ordner {c}", 2, 6, "b"),
                ("Schreibtischlampe", 24, 79, "1"),
                ("Kugelschreiber {c}", 1, 4, "b"),
                ("Toner {c}", 45, 120, "n"),
                ("Versandtaschen C4, <25|50|100> St.", 5, 15, "n"),
            ),
        ),
        "Bäckerei": (
            ("Bäckerei {}", "Backstube {}", "Café {}"),
            (
                ("Roggenbrot {kg} kg", 4, 9, "n"),
                ("Brezel", 1, 2, "b"),
                ("Käsekuchen", 18, 32, "1"),
                ("Milchkaffee", 3, 5, "n"),
                ("Apfelstrudel", 3, 6, "n"),
                ("Dinkelmehl", 1, 3, "k"),
                ("Laugenbrötchen", 1, 2, "b"),
            ),
        ),
        "EDV": (
            ("{} IT-Systeme", "{} EDV-Service", "{} Datentechnik"),
            (
                ("Fernwartung", 60, 110, "h"),
                ("Monitor <22|24|27|32> Zoll", 140, 420, "n"),
                ("Datensicherung {m}", 25, 90, "1"),
                ("Netzwerkkabel <1|2|3|5|10> m", 3, 9, "b"),
                ("Tastatur {c}", 25, 90, "n"),
                ("Lizenzverlängerung", 49, 320, "n"),
            ),
        ),
        "Garten": (
            ("{} Gartenbau", "Gärtnerei {}", "{} Baumschule"),
            (
                ("Heckenschnitt", 32, 55, "h"),
                ("Rasenpflege {m}", 40, 120, "1"),
                ("Blumenerde <20|40|60> l", 5, 12, "b"),
                ("Apfelbaum <120|150|180> cm", 28, 70, "n"),
                ("Kies", 30, 60, "k"),
                ("Tontopf <14|18|24|30> cm", 8, 35, "n"),
            ),
        ),
        "Kfz": (
            ("Autohaus {}", "Kfz-Werkstatt {}", "Reifen {}"),
            (
                ("Ölwechsel", 49, 95, "1"),
                ("Motoröl", 8, 15, "k"),
                ("Bremsbeläge vorn", 45, 120, "1"),
                ("Arbeitslohn Mechaniker", 55, 98, "h"),
                ("Winterreifen R<15|16|17|18>", 70, 160, "n"),
                ("Wischerblatt <45|50|55|60> cm", 9, 22, "n"),
            ),
        ),
        "Gasthof": (
            ("Gasthof {}", "Hotel {}", "{} Catering"),
            (
                ("Übernachtung Einzelzimmer", 68, 120, "n"),
                ("Frühstück", 9, 16, "n"),
                ("Mittagstisch", 10, 18, "n"),
                ("Apfelschorle <0,3|0,5> l", 3, 6, "n"),
                ("Saalmiete {m}", 120, 400, "1"),
                ("Parkplatz", 6, 15, "n"),
            ),
        ),
        "Elektro": (
            ("Elektro {}", "{} Elektrotechnik", "Licht & Strom {}"),
            (
                ("LED-Lampe <4|7|9|12> W", 3, 9, "b"),
                ("Elektriker vor Ort", 48, 88, "h"),
                ("Kabel <3G1,5|3G2,5|5G2,5>", 1, 5, "k"),
                ("Steckdose {c}", 5, 16, "n"),
                ("Sicherungskasten", 180, 490, "1"),
                ("Deckenleuchte <30|40|60> cm", 35, 120, "n"),
            ),
        ),
    },
    "fr": {
        "boulangerie": (
            ("Boulangerie {}", "Pâtisserie {}", "Le Four {}"),
            (
                ("Pain de campagne {kg} kg", 4, 9, "n"),
                ("Croissant au beurre", 1, 2, "b"),
                ("Tarte aux pommes", 14, 28, "1"),
                ("Café crème", 2, 5, "n"),
                ("Farine de blé", 1, 3, "k"),
                ("Sablés, sachet de {n}", 4, 9, "n"),
            ),
        ),
        "menuiserie": (
            ("Menuiserie {}", "{} Bois", "Ébénisterie {}"),
            (
                ("Étagère chêne {cm} cm", 14, 48, "n"),
                ("Pose sur place", 38, 64, "h"),
                ("Charnière {c}", 3, 12, "n"),
                ("Contreplaqué {mm} mm", 22, 60, "n"),
                ("Réparation de fenêtre", 120, 380, "1"),
                ("Tasseau pin", 2, 6, "k"),
            ),
        ),
        "bureau": (
            ("Papeterie {}", "{} Bureau", "{} Fournitures"),
            (
                ("Papier A4, <250|500> feuilles", 4, 9, "b"),
                ("Classeur {c}", 2, 6, "b"),
                ("Lampe de bureau", 24, 79, "1"),
                ("Stylo gel {c}", 1, 4, "b"),
                ("Cartouche de toner", 45, 120, "n"),
                ("Enveloppes C5, lot de <25|50|100>", 5, 15, "n"),
            ),
        ),
        "informatique": (
            ("{} Informatique", "{} Réseaux", "{} Numérique"),
            (
                ("Assistance à distance", 55, 95, "h"),
                ("Écran <22|24|27|32> pouces", 140, 420, "n"),
                ("Sauvegarde {m}", 25, 90, "1"),
                ("Câble réseau <1|2|3|5|10> m", 3, 9, "b"),
                ("Clavier {c}", 25, 90, "n"),
                ("Licence annuelle", 49, 320, "n"),
            ),
        ),
        "jardin": (
            ("Jardins {}", "Pépinière {}", "{} Paysage"),
            (
                ("Taille de haie", 30, 52, "h"),
                ("Tonte {m}", 40, 120, "1"),
                ("Terreau <20|40|60> l", 5, 12, "b"),
                ("Pommier <120|150|180> cm", 28, 70, "n"),
                ("Gravier", 30, 60, "k"),
                ("Pot en terre <14|18|24|30> cm", 8, 35, "n"),
            ),
        ),
        "restaurant": (
            ("Brasserie {}", "Traiteur {}", "Auberge {}"),
            (
                ("Menu du jour", 14, 26, "n"),
                ("Plateau de fromages", 24, 65, "1"),
                ("Eau minérale <0,5|1> l", 2, 5, "n"),
                ("Service en salle", 22, 36, "h"),
                ("Buffet pour <10|15|20|30>", 90, 420, "1"),
                ("Limonade maison", 3, 6, "n"),
            ),
        ),
    },
    "sv": {
        "snickeri": (
            ("{} Snickeri", "{} Bygg", "{} Trä"),
            (
                ("Hyllplan ek {cm} cm", 14, 48, "n"),
                ("Montering på plats", 42, 68, "h"),
                ("Gångjärn {c}", 3, 12, "n"),
                ("Plywood björk {mm} mm", 22, 60, "n"),
                ("Fönsterrenovering", 120, 380, "1"),
                ("Trälim <1|2|5> l", 6, 19, "n"),
            ),
        ),
        "it": (
            ("{} Data", "{} IT-konsult", "{} Nätverk"),
            (
                ("Fjärrsupport", 60, 110, "h"),
                ("Skärm <22|24|27|32> tum", 140, 420, "n"),
                ("Säkerhetskopiering {m}", 25, 90, "1"),
                ("Nätverkskabel <1|2|3|5|10> m", 3, 9, "b"),
                ("Tangentbord {c}", 25, 90, "n"),
                ("Licens", 49, 320, "n"),
            ),
        ),
        "bageri": (
            ("{} Bageri", "{} Konditori", "{} Kafé"),
            (
                ("Rågbröd {kg} kg", 4, 9, "n"),
                ("Kanelbulle", 2, 4, "b"),
                ("Prinsesstårta", 24, 42, "1"),
                ("Kaffe", 2, 4, "n"),
                ("Vetemjöl", 1, 3, "k"),
                ("Smörgås med ost", 4, 8, "n"),
            ),
        ),
        "städ": (
            ("{} Städ", "{} Fastighetsservice", "{} Fönsterputs"),
            (
                ("Kontorsstädning {m}", 180, 620, "1"),
                ("Fönsterputs", 28, 45, "h"),
                ("Handtvål <1|2|5> l", 6, 18, "n"),
                ("Pappershanddukar, <6|12|24> rullar", 9, 26, "n"),
                ("Storstädning kök", 95, 260, "1"),
                ("Sopsäckar <20|35|60> l", 3, 8, "b"),
            ),
        ),
    },
}

COLOURS = {
    "en": ("black", "white", "blue", "red", "green", "grey", "brass"),
    "de": ("schwarz", "weiß", "blau", "rot", "grün", "grau"),
    "fr": ("noir", "blanc", "bleu", "rouge", "vert", "gris"),
    "sv": ("svart", "vit", "blå", "röd", "grön", "grå"),
}
MONTHS = {
    "en": [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ],
    "de": [
        "Januar",
        "Februar",
        "März",
        "April",
        "Mai",
        "Juni",
        "Juli",
        "August",
        "September",
        "Oktober",
        "November",
        "Dezember",
    ],
    "fr": [
        "janvier",
        "février",
        "mars",
        "avril",
        "mai",
        "juin",
        "juillet",
        "août",
        "septembre",
        "octobre",
        "novembre",
        "décembre",
    ],
    "sv": [
        "januari",
        "februari",
        "mars",
        "april",
        "maj",
        "juni",
        "juli",
        "augusti",
        "september",
        "oktober",
        "november",
        "december",
    ],
}

CUSTOMERS = {
    "en": (
        "Marsh Pottery|R. Albright|Holloway Primary School|Dr. S. Menon|Harbor View Inn|Tina Kowal|"
        "Weaver & Hunt LLP|Parish of St. Brigid|Orchard Nursing Home|J. Fairweather|Peak Climbing Club|"
        "Ms. L. Adeyemi|Cartwright Dental|Foxglove Theatre|Mr. B. Sorensen|Riverside Rowing Club|"
        "Ocean Drive Motel|Anna Petrova|Union Street Studios|Gale Farm"
    ),
    "de": (
        "Frau Ute Berger|Stadtwerke Auental|Praxis Dr. Lang|Herr K. Yildiz|Kita Sternschnuppe|"
        "TSV Rotbach|Familie Ostrowski|Kanzlei Heim & Stolz|Weingut Kahl|Hotel Zur Post|Museum am Wall|"
        "Tanja Riedl|Pfarramt St. Veit|Ingenieurbüro Salm"
    ),
    "fr": (
        "Mme Claire Ozanne|Mairie de Saint-Aubin|Cabinet Dr Blin|M. Youssef Amrani|École des Tilleuls|"
        "Camping du Lac|Famille Guérin|Étude Morel|Théâtre du Port|Mlle S. Caron|Hôtel Bellevue|"
        "Association Les Amis"
    ),
    "sv": (
        "Anna Nyström|Brf Solsidan|Tandläkare Holm|Förskolan Kotten|Erik Lund|Restaurang Bryggan|"
        "Idrottsklubben Pilen|Museet i Viken"
    ),
}

LABELS = {
    "en": {
        "invoice": ("Invoice", "Invoice", "Bill"),
        "receipt": ("Receipt", "Sales receipt"),
        "number": ("Invoice no.", "Invoice number", "Invoice #", "Inv. no."),
        "receipt_number": ("Receipt no.", "Receipt #", "Sales no."),
        "date": ("Date", "Invoice date", "Issued", "Date of issue"),
        "due": ("Due date", "Payable by", "Due"),
        "delivered": ("Delivered", "Delivery date"),
        "vendor": ("Seller", "From", "Supplier", "Vendor"),
        "customer": ("Bill to", "Customer", "Buyer", "Sold to"),
        "desc": ("Description", "Item", "Article"),
        "qty": ("Qty", "Quantity"),
        "price": ("Unit price", "Price", "Each"),
        "amount": ("Amount", "Line total"),
        "pos": ("Pos", "No."),
        "currency": ("Currency",),
        "net": ("Subtotal", "Net", "Net amount"),
        "subtotal": ("Subtotal",),
        "incl": ("incl.", "includes"),
        "total": ("Total", "Total due", "Amount due", "Grand total", "To pay"),
        "order": ("Order no.", "Your order", "PO number"),
        "account": ("Customer no.", "Account"),
        "phone": ("Phone", "Tel."),
        "cash": ("Cash",),
        "change": ("Change",),
        "pcs": ("pcs", "pc", "units"),
        "thanks": ("Thank you for your business", "Thank you for your custom", "Goods remain our property until paid"),
        "terms": ("Payable within 30 days", "Payment terms: 14 days net", "Please quote the number when paying"),
        "page": ("Page 1 of 1", "Page 1/1", "- 1 -", "COPY", "scanned document"),
    },
    "de": {
        "invoice": ("Rechnung", "Rechnung"),
        "receipt": ("Kassenbon", "Quittung"),
        "number": ("Rechnungsnr.", "Rechnung Nr.", "Rechnungsnummer", "Rg.-Nr."),
        "receipt_number": ("Bon-Nr.", "Beleg-Nr."),
        "date": ("Datum", "Rechnungsdatum"),
        "due": ("Zahlbar bis", "Fällig am"),
        "delivered": ("Lieferdatum", "Geliefert am"),
        "vendor": ("Verkäufer", "Lieferant", "Von"),
        "customer": ("Kunde", "Rechnung an", "Empfänger"),
        "desc": ("Bezeichnung", "Artikel", "Leistung"),
        "qty": ("Menge", "Anzahl"),
        "price": ("Einzelpreis", "Preis", "E-Preis"),
        "amount": ("Betrag", "Gesamt", "Summe"),
        "pos": ("Pos", "Nr."),
        "currency": ("Währung",),
        "subtotal": ("Zwischensumme",),
        "net": ("Zwischensumme", "Netto", "Nettobetrag"),
        "incl": ("inkl.", "enthält"),
        "total": ("Gesamtbetrag", "Rechnungsbetrag", "Zu zahlen", "Endbetrag"),
        "order": ("Bestellnr.", "Ihr Auftrag", "Auftrags-Nr."),
        "account": ("Kundennr.", "Kd.-Nr."),
        "phone": ("Tel.", "Telefon"),
        "cash": ("Bar", "Gegeben"),
        "change": ("Rückgeld",),
        "pcs": ("Stk", "Stück", "St."),
        "thanks": (
            "Vielen Dank für Ihren Einkauf",
            "Wir danken für Ihren Auftrag",
            "Ware bleibt bis zur Zahlung unser Eigentum",
        ),
        "terms": ("Zahlbar in 14 Tagen ohne Abzug", "Bitte bei Zahlung die Nummer angeben", "Zahlungsziel: 30 Tage"),
        "page": ("Seite 1 von 1", "Seite 1/1", "- 1 -", "KOPIE", "Original"),
    },
    "fr": {
        "invoice": ("Facture", "Facture"),
        "receipt": ("Ticket de caisse", "Reçu"),
        "number": ("Facture n°", "N° de facture", "Numéro de facture"),
        "receipt_number": ("Ticket n°", "Reçu n°"),
        "date": ("Date", "Date de facture", "Émise le"),
        "due": ("À payer avant le", "Échéance"),
        "delivered": ("Livré le", "Date de livraison"),
        "vendor": ("Vendeur", "Fournisseur", "De"),
        "customer": ("Client", "Facturé à", "Acheteur"),
        "desc": ("Désignation", "Article", "Libellé"),
        "qty": ("Qté", "Quantité"),
        "price": ("Prix unitaire", "P.U.", "Prix"),
        "amount": ("Montant", "Total ligne"),
        "pos": ("Pos", "N°"),
        "currency": ("Devise",),
        "subtotal": ("Sous-total",),
        "net": ("Total HT", "Montant HT"),
        "incl": ("dont", "inclus"),
        "total": ("Total TTC", "Net à payer", "Total à payer", "Total"),
        "order": ("Commande n°", "Votre commande"),
        "account": ("N° client", "Code client"),
        "phone": ("Tél.", "Téléphone"),
        "cash": ("Espèces",),
        "change": ("Rendu",),
        "pcs": ("pcs", "unités", "u."),
        "thanks": ("Merci de votre visite", "Merci de votre confiance", "Pas d'escompte pour paiement anticipé"),
        "terms": ("Paiement à 30 jours", "Règlement à réception", "Merci d'indiquer le numéro au paiement"),
        "page": ("Page 1 sur 1", "Page 1/1", "- 1 -", "DUPLICATA", "Original"),
    },
    "sv": {
        "invoice": ("Faktura", "Faktura"),
        "receipt": ("Kvitto", "Kassakvitto"),
        "number": ("Fakturanr", "Faktura nr", "Fakturanummer"),
        "receipt_number": ("Kvitto nr", "Kvittonummer"),
        "date": ("Datum", "Fakturadatum"),
        "due": ("Förfallodag", "Betalas senast"),
        "delivered": ("Leveransdatum", "Levererat"),
        "vendor": ("Säljare", "Leverantör", "Från"),
        "customer": ("Kund", "Köpare", "Faktureras"),
        "desc": ("Benämning", "Artikel", "Beskrivning"),
        "qty": ("Antal", "Mängd"),
        "price": ("A-pris", "Pris", "Styckpris"),
        "amount": ("Belopp", "Summa"),
        "pos": ("Rad", "Nr"),
        "currency": ("Valuta",),
        "subtotal": ("Delsumma",),
        "net": ("Delsumma", "Netto", "Exkl. moms"),
        "incl": ("varav", "inkl."),
        "total": ("Att betala", "Totalt", "Summa att betala"),
        "order": ("Ordernr", "Er order"),
        "account": ("Kundnr", "Kundnummer"),
        "phone": ("Tel", "Telefon"),
        "cash": ("Kontant",),
        "change": ("Växel",),
        "pcs": ("st", "st."),
        "thanks": ("Tack för ditt köp", "Välkommen åter", "Vi tackar för förtroendet"),
        "terms": ("Betalning inom 30 dagar", "Ange numret vid betalning"),
        "page": ("Sida 1 av 1", "Sida 1/1", "- 1 -", "KOPIA"),
    },
}

# ---- whole sentences of e-mails, letters and web orders
FROM = {"en": "From", "de": "Von", "fr": "De", "sv": "Från"}
GREETING = {
    "en": ("Dear {who},", "Hello {who},", "Hi {who},"),
    "de": ("Guten Tag {who},", "Hallo {who},"),
    "fr": ("Bonjour {who},", "Bonjour,"),
    "sv": ("Hej {who},", "Hej,"),
}
PROSE = {
    "en": (
        "Please find below our invoice {no} of {date}. We charge {items}. {tax}The total comes to {total}.",
        "this is invoice {no}, dated {date}. You bought {items}. {tax}Please transfer {total} to us.",
        "thank you for your order. On {date} we supplied {items}. {tax}Total to pay: {total}. Our reference is {no}.",
    ),
    "de": (
        "anbei unsere Rechnung {no} vom {date}. Wir berechnen {items}. {tax}Der Gesamtbetrag ist {total}.",
        "mit Rechnung {no} vom {date} erlauben wir uns zu berechnen: {items}. {tax}Bitte überweisen Sie {total}.",
    ),
    "fr": (
        "Veuillez trouver notre facture {no} du {date} pour {items}. {tax}Le total est de {total}.",
        "Suite à votre commande, voici la facture {no} du {date} : {items}. {tax}Merci de régler {total}.",
    ),
    "sv": (
        "Här kommer faktura {no} av den {date} för {items}. {tax}Totalt att betala: {total}.",
        "Tack för din beställning. Faktura {no}, {date}, avser {items}. {tax}Vänligen betala {total}.",
    ),
}
PROSE_ITEM = {
    "en": ("{qty} x {desc} at {price} each, {amount}", "{qty} {desc} at {price}, which makes {amount}"),
    "de": ("{qty} x {desc} zu je {price}, zusammen {amount}",),
    "fr": ("{qty} x {desc} à {price}, soit {amount}",),
    "sv": ("{qty} x {desc} à {price}, summa {amount}",),
}
PROSE_TAX = {
    "en": "Net {net}, plus {rate} {name} {tax}. ",
    "de": "Netto {net}, zuzüglich {rate} {name} {tax}. ",
    "fr": "Montant HT {net}, {name} {rate} {tax}. ",
    "sv": "Netto {net}, {name} {rate} {tax}. ",
}
AND = {"en": " and ", "de": " sowie ", "fr": " et ", "sv": " samt "}
DATED = {"en": ("of", "dated"), "de": ("vom",), "fr": ("du",), "sv": ("av den",)}
SUBJECT = {"en": "Subject", "de": "Betreff", "fr": "Objet", "sv": "Ämne"}
CLOSING = {
    "en": ("Kind regards", "Best wishes", "Yours faithfully"),
    "de": ("Mit freundlichen Grüßen", "Viele Grüße"),
    "fr": ("Cordialement", "Bien à vous"),
    "sv": ("Vänliga hälsningar", "Med vänlig hälsning"),
}
WE_CHARGE = {
    "en": ("For our work we charge:", "As agreed we bill you for:", "Our services in detail:"),
    "de": ("Für unsere Leistungen berechnen wir:", "Wie vereinbart stellen wir in Rechnung:"),
    "fr": ("Pour nos prestations, nous facturons :", "Comme convenu, nous vous facturons :"),
    "sv": ("För vårt arbete debiterar vi:", "Enligt överenskommelse fakturerar vi:"),
}
WEB_THANKS = {
    "en": ("Thanks for your order!", "Your order is on its way!"),
    "de": ("Danke für Ihre Bestellung!", "Ihre Bestellung ist unterwegs!"),
    "fr": ("Merci pour votre commande !", "Votre commande est en route !"),
    "sv": ("Tack för din beställning!", "Din beställning är på väg!"),
}
SOLD_BY = {"en": "Sold by", "de": "Verkauft von", "fr": "Vendu par", "sv": "Säljs av"}
EACH = {"en": "each", "de": "je", "fr": "l'unité", "sv": "per st"}
DELIVERY_NOTE = {
    "en": "Delivery note and invoice",
    "de": "Lieferschein mit Rechnung",
    "fr": "Bon de livraison et facture",
    "sv": "Följesedel och faktura",
}
RECEIVED = {
    "en": "Received in good order: ____",
    "de": "Ware erhalten: ____",
    "fr": "Reçu en bon état : ____",
    "sv": "Mottaget: ____",
}
TERSE = {  # words of a hand-written note: bill, total, tax included
    "en": ("bill", "tot", "tax in"),
    "de": ("Rg", "ges", "inkl"),
    "fr": ("fact", "tot", "ttc"),
    "sv": ("fakt", "tot", "ink moms"),
}


@dataclass(frozen=True)
class Vendor:
    name: str
    country: str
    trade: str


def vendors() -> list[Vendor]:
    """Return all vendors in fixed order: each distinctive part with a trade of its country's language, legal form."""
    result = []
    for country, stems in STEMS.items():
        spec = COUNTRIES[country]
        trades = list(TRADES[spec.language])
        for i, stem in enumerate(stems.split("|")):
            trade = trades[i % len(trades)]
            patterns = TRADES[spec.language][trade][0]
            name = patterns[(i // len(trades) + i) % len(patterns)].format(stem.replace("+", " & "))
            form = spec.forms[i % len(spec.forms)]
            if "&" in form and "&" in name:
                form = ""
            result.append(Vendor(f"{name} {form}".strip(), country, trade))
    return result

"""The vocabulary of the generated problems: names, things, places, units and their singulars.

Plain word lists written for this generator; nothing here is taken from a data set.
"""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


NAMES: Final = _words(
    """
    Ada Aisha Alan Alma Amir Ana Andre Anna Anton Ava Bella Ben Bruno Carla Carlos Cara Chen Chloe Clara
    Dana Daniel David Diego Dina Elena Eli Ella Emil Emma Eric Eva Farah Felix Fiona Frank Freya Gina Grace
    Hana Hans Hugo Ibrahim Ida Igor Iris Ivan Jack Jade James Jana Jonas Julia Kai Kamal Karen Karim Kate
    Kenji Lara Lea Leo Lena Liam Lily Lina Lucas Lucy Luis Maria Marco Mei Mia Milo Mina Nadia Nina Noah
    Nora Olga Oliver Omar Oscar Paul Peter Petra Priya Quinn Rosa Ravi Robin Ruth Sam Sara Simon Sofia Tara
    Theo Tom Uma Vera Victor Yara Yusuf Zara Zoe
    """
)

THINGS: Final = _words(
    """
    apple badge bag ball balloon banana basket battery bell belt blanket board bolt book bookmark bottle
    bowl box bracelet brick brush bucket button cake candle cap card carrot chair cherry clock coat coin
    comb cookie cork crayon cup cushion daisy desk doll drum egg envelope eraser fan feather fig flag flask
    flower folder fork frame glove grape guitar hammer hat helmet hook jacket jar kettle key kite ladder
    lamp leaflet lemon letter lime lock magnet map marble marker mask melon mirror mug muffin nail napkin
    necklace needle notebook nut onion orange paddle pancake peach pear pebble pen pencil pepper photo
    pillow pin plant plate plum poster puzzle radio ribbon ring robot rope rose ruler sandal scarf seed
    shell shirt shovel skirt sock spoon sponge stamp sticker stone stool sweater ticket tile torch towel toy
    tray tulip vase violin wheel whistle
    """
)

PLACES: Final = _words(
    """
    bakery bookshop bazaar cafe fair farm garden gallery harbour kiosk library mall market museum park
    school shop stall store studio supermarket theatre warehouse workshop
    """
)

CITIES: Final = _words(
    """
    Accra Athens Bergen Berlin Bern Bogota Boston Cairo Cork Dakar Delhi Dublin Geneva Ghent Hanoi Havana
    Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Milan Nairobi Oslo Paris Perth Porto Prague Quito Riga
    Rome Seoul Sofia Tokyo Tunis Turin Vienna Warsaw Zurich
    """
)

TOWNS: Final = _words(
    """
    Ashby Ashford Barton Birchley Bradwell Brookton Burnham Carlow Clayton Coldwater Dalton Denby Easton
    Elmley Fairview Farley Fernhill Greenford Hadley Hartwell Hilltop Hollins Kingsley Lakeside Langley
    Marlow Merton Millbrook Newbury Norton Oakham Oldtown Pinewood Redhill Riverton Seaford Stanton Stoneham
    Thornton Upton Weston Whitby Woodside
    """
)

NOUNS: Final = _words(
    """
    ages amounts balances costs counts days distances fees goals grades heights hours items lengths levels
    limits marks minutes numbers orders points prices ranks rates readings results sales scores sizes speeds
    steps sums times values votes weights widths years
    """
)

WORDS: Final = _words(
    """
    apple pear plum fig kiwi lemon mango grape peach melon oak elm birch cedar maple river lake hill sand stone
    cloud rain snow wind storm cat dog horse sheep goat tiger eagle robin owl red blue green amber ivory
    """
)

SUBJECTS: Final = _words(
    """
    Art Biology Chess Choir Dance Drama English French German Guitar History Judo Maths Music Physics Piano
    Rowing Spanish Swimming Tennis Yoga
    """
)

WORD_LISTS: Final = _words("cities colours entries labels lines names tags titles tokens words")
COLLECTIONS: Final = _words("animals books boats cars cities games items players plants rooms shops teams tools")
KEYS: Final = _words("age cost height level price rank score size speed stock weight year")
STREETS: Final = _words("Hill Lake Mill Oak Park Rose Station Church Bridge Garden")
EVENTS: Final = _words("Concert Lecture Meeting Party Picnic Race Reading Show Workshop Festival")
LANGUAGES: Final = _words("Arabic Dutch English French German Hindi Italian Polish Spanish Turkish")
ADJECTIVES: Final = _words("Lost Last First Silent Golden Hidden Broken Secret Little Old")
ACTIVITIES: Final = _words("points pages laps goals letters photos")
CURRENCIES: Final = ("dollars", "euros", "pounds", "coins", "tokens", "crowns")
CONTAINERS: Final = ("boxes", "bags", "packs", "crates", "baskets", "trays", "shelves", "drawers")
VEHICLES: Final = ("car", "bus", "train", "truck", "van", "coach", "lorry", "taxi", "minibus", "motorbike")
AREAS: Final = ("garden", "field", "room", "yard", "park", "floor", "carpet", "lawn", "court", "terrace")
LENGTHS: Final = ("metres", "feet", "yards", "centimetres", "inches")
COLOURS: Final = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "grey")
WEEKDAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

PLURAL: Final = {
    word: _plural(word) for word in (*THINGS, "dollar", "euro", "pound", "crown", "token", "yard", "metre")
}
SINGULAR: Final = {plural: word for word, plural in PLURAL.items()} | {
    "boxes": "box", "packs": "pack", "crates": "crate", "shelves": "shelf", "drawers": "drawer",
    "feet": "foot", "inches": "inch", "centimetres": "centimetre", "hours": "hour", "minutes": "minute",
    "seconds": "second", "days": "day", "weeks": "week", "years": "year", "months": "month",
    "points": "point", "friends": "friend", "children": "child", "pages": "page", "units": "unit",
}  # fmt: skip


def amount(count: int, plural: str) -> str:
    """A count with its noun in the right number, as in `1 box` or `3 boxes`."""
    return f"{count} {SINGULAR.get(plural, plural) if count == 1 else plural}"

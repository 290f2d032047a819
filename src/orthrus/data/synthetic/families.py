"""The families of problems by domain, in the order in which they are drawn, which may not change.

A family's name is that of its phrasings in `phrases.toml`.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

from orthrus.data.synthetic import counting, measuring, number_functions, objects, record_functions, tables
from orthrus.data.synthetic.draw import Draft, Draw

Domain = Literal["maths", "code", "table", "json"]
Family: TypeAlias = Callable[[Draw], Draft]

FAMILIES: Final[Mapping[Domain, Mapping[str, Family]]] = {
    "maths": {
        "shopping": counting.shopping,
        "change": counting.change,
        "distance": measuring.distance,
        "sharing": counting.sharing,
        "comparing": counting.comparing,
        "doubling": counting.doubling,
        "giving": counting.giving,
        "rectangle": measuring.rectangle,
        "percent": counting.percent,
        "average": measuring.average,
        "ages": measuring.ages,
        "conversion": measuring.conversion,
        "equation": measuring.equation,
        "sequence": measuring.sequence,
        "budget": counting.budget,
    },
    "code": {
        "count_where": number_functions.count_where,
        "keep_where": number_functions.keep_where,
        "sum_where": number_functions.sum_where,
        "first_where": number_functions.first_where,
        "sum_multiples": number_functions.sum_multiples,
        "first_multiples": number_functions.first_multiples,
        "clamp": number_functions.clamp,
        "rescale": number_functions.rescale,
        "pick_word": record_functions.pick_word,
        "words_by_letter": record_functions.words_by_letter,
        "tally": record_functions.tally,
        "join_text": record_functions.join_text,
        "convert": record_functions.convert,
        "best_record": record_functions.best_record,
        "discount": number_functions.discount,
        "dictionary_where": record_functions.dictionary_where,
    },
    "table": {
        "people": tables.people_table,
        "order": tables.order_table,
        "scores": tables.score_table,
        "schedule": tables.schedule_table,
        "stock": tables.stock_table,
    },
    "json": {
        "contact": objects.contact_json,
        "order": objects.order_json,
        "event": objects.event_json,
        "settings": objects.settings_json,
        "book": objects.book_json,
        "team": objects.team_json,
    },
}

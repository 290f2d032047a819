"""The families of functions to write, in the order in which they are drawn."""

from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic import number_functions, record_functions
from orthrus.data.synthetic.draw import Draft, Draw

FAMILIES: Final[tuple[Callable[[Draw], Draft], ...]] = (
    number_functions.count_where,
    number_functions.keep_where,
    number_functions.sum_where,
    number_functions.first_where,
    number_functions.sum_multiples,
    number_functions.first_multiples,
    number_functions.clamp,
    number_functions.rescale,
    record_functions.pick_word,
    record_functions.words_by_length,
    record_functions.tally,
    record_functions.join_text,
    record_functions.convert,
    record_functions.best_record,
    number_functions.discount,
    record_functions.dictionary_where,
)

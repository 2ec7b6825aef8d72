"""The embedded pairs: premises and hypotheses from a small lexicon, whose labels follow from their meaning.

A sentence bounds the size of a set, the members of a noun that have a property: "at least three sparrows are wet",
"fewer than two birds aren't clean". Nouns are nested in trees, adjectives come in complementary pairs, and everything
else is independent, so whether one sentence entails or contradicts another is decided by logic alone:

    |S| >= k  entails  |T| >= m      if S ⊆ T and m <= k,
    |T| < m   entails  |S| < k       by contraposition,
    |S| >= k  and  |T| < m  contradict each other under the same condition,

and every other pair is neutral. Sets may be empty: "all of the owls are wet" and "none of the owls are wet" are both
true where there are no owls.

No word tells the label. Entailment and contradiction differ in whether the two sentences bound in the same direction,
and a neutral pair breaks one or more of their conditions: the nouns' order or relation, the numbers' order, the
adjective. Each word is as frequent in the premises of one label as in those of another, and so in the hypotheses.
Therefore the best linear classifier of two bags of words is one that ignores them: its convex loss has the gradient
zero at the weights zero. Pairs have to be read by comparing their words, which stand at a constant distance: every
sentence has six of them.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


LABELS = ("entailment", "neutral", "contradiction")
FEATURES = Features(
    {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=list(LABELS))}
)

# All trees have one shape. Otherwise a noun that replaces one of its level could be more frequent in neutral pairs.
TREES = {
    "animals": {"birds": ("sparrows", "owls"), "insects": ("bees", "beetles")},
    "plants": {"trees": ("oaks", "pines"), "flowers": ("roses", "tulips")},
    "vehicles": {"boats": ("ferries", "canoes"), "cars": ("taxis", "limousines")},
    "instruments": {"drums": ("bongos", "tambourines"), "horns": ("trumpets", "tubas")},
}
ANTONYMS = (("clean", "dirty"), ("wet", "dry"), ("warm", "cold"), ("heavy", "light"))
# From two on; one is said by "some", "none", "all" and "not all".
NUMBERS = ("two", "three", "four", "five", "six", "seven")

# Share of the sentences that say an adjective by negating its opposite.
NEGATIONS = 0.1
# Well below the number of distinct pairs, so that drawing pairs until they are distinct ends soon, and common pairs do
# not run out.
MOST_PAIRS = 40_000


class Statement(NamedTuple):
    """What a sentence says: at least, or fewer than, `number` members of `noun` are `adjective`."""

    at_least: bool
    number: int
    noun: str
    adjective: str


def _ancestors() -> dict[str, tuple[str, ...]]:
    """Each noun with itself and the nouns above it, lowest first."""
    ancestors = {}
    for root, branches in TREES.items():
        ancestors[root] = (root,)
        for branch, leaves in branches.items():
            ancestors[branch] = (branch, root)
            ancestors.update({leaf: (leaf, branch, root) for leaf in leaves})
    return ancestors


_ANCESTORS = _ancestors()
_NESTED = [(lower, upper) for lower, ancestors in _ANCESTORS.items() for upper in ancestors]
_OPPOSITES = {word: other for pair in ANTONYMS for word, other in (pair, pair[::-1])}


def label_of(premise: Statement, hypothesis: Statement) -> str:
    """The label that follows from the meaning; one of `LABELS`."""
    # "At least" says more of a narrow set and a large number, "fewer than" of a wide set and a small number.
    narrow, wide = (premise, hypothesis) if premise.at_least else (hypothesis, premise)
    nested = wide.noun in _ANCESTORS[narrow.noun] and narrow.adjective == wide.adjective
    if not (nested and wide.number <= narrow.number):
        return "neutral"
    return "entailment" if premise.at_least == hypothesis.at_least else "contradiction"


def load_entailment_pairs(
    seed: int = 0, train_size: int = 24_000, validation_size: int = 2_000, test_size: int = 2_000
) -> DatasetDict:
    """Pairs of sentences; no pair has the meaning of another one, be it of the same or of another split.

    The same arguments give the same pairs in every process and every version of Python. The labels take turns, so
    any first rows of a split are balanced.

    Args:
        seed: seed of the pairs.
        train_size: number of pairs of the split `train`.
        validation_size: number of pairs of the split `validation`.
        test_size: number of pairs of the split `test`.

    Returns:
        a `DatasetDict` with the columns `premise`, `hypothesis` and `label`.

    Raises:
        ValueError: if a size is negative, or if there are more than 40,000 pairs.
    """
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    if min(sizes.values()) < 0 or sum(sizes.values()) > MOST_PAIRS:
        raise ValueError(f"sizes of splits must be at least 0 and at most {MOST_PAIRS:,} together, not {sizes}")
    generator = random.Random(seed)
    seen = set()
    splits = {}
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            label = LABELS[len(rows) % len(LABELS)]
            pair = draw_pair(label, generator)
            if pair not in seen:
                seen.add(pair)
                premise, hypothesis = (write(statement, generator) for statement in pair)
                rows.append({"premise": premise, "hypothesis": hypothesis, "label": label})
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        columns["label"] = FEATURES["label"].str2int(columns["label"])
        splits[split] = Dataset.from_dict(columns, features=FEATURES)
    return DatasetDict(splits)


def draw_pair(label: str, generator: random.Random) -> tuple[Statement, Statement]:
    """A premise and a hypothesis of the given label."""
    lower, upper = _pick(_NESTED, generator)
    # "Some" and "none" tell both direction and number. Beside larger numbers they would tell the label as well: "some"
    # is a hypothesis that many premises entail and that only "none" contradicts. So they meet none but each other, as
    # often as any two numbers do.
    quantified = generator.random() < 1 / 16
    few, many = (1, 1) if quantified else sorted(_pick(range(2, len(NUMBERS) + 2), generator) for _ in range(2))
    adjective = _pick(list(_OPPOSITES), generator)
    narrow, wide = (many, lower, adjective), (few, upper, adjective)
    if label == "neutral":
        narrow, wide = _break_conditions(narrow, wide, generator)

    at_least = _flip(generator)
    premise, hypothesis = (narrow, wide) if at_least else (wide, narrow)
    same_direction = {"entailment": True, "contradiction": False}.get(label, _flip(generator))
    return Statement(at_least, *premise), Statement(at_least == same_direction, *hypothesis)


def _break_conditions(narrow: tuple, wide: tuple, generator: random.Random) -> tuple[tuple, tuple]:
    """Change a pair (number, noun, adjective), (number, noun, adjective) so that neither sentence says anything of the
    other: its nouns, its numbers, its adjectives, or several of them.

    Swapping keeps the words of the pair, and a new word is drawn from those of its kind, so each word stays as
    frequent as it was.
    """
    (many, lower, adjective), (few, upper, _) = narrow, wide
    # Numbers are the easiest to compare; pairs that they decide teach nothing else.
    breakable = {"nouns": 0.6, "adjectives": 0.5, "numbers": 0.25 if few != many else 0.0}
    broken = []
    while not broken:
        broken = [condition for condition, share in breakable.items() if generator.random() < share]

    numbers, nouns, adjectives = [many, few], [lower, upper], [adjective, adjective]
    if "numbers" in broken:
        numbers.reverse()
    if "nouns" in broken:
        if lower != upper and _flip(generator):
            nouns.reverse()
        elif _flip(generator):
            nouns[0] = _unrelated(lower, upper, generator)
        else:
            nouns[1] = _unrelated(upper, lower, generator)
    if "adjectives" in broken:
        opposite = _OPPOSITES[adjective]
        others = [word for word in _OPPOSITES if word not in (adjective, opposite)]
        adjectives[_pick((0, 1), generator)] = opposite if _flip(generator) else _pick(others, generator)
    return (numbers[0], nouns[0], adjectives[0]), (numbers[1], nouns[1], adjectives[1])


def _unrelated(noun: str, partner: str, generator: random.Random) -> str:
    """A noun of the level of `noun` that is neither above nor below `partner`; every second one from its tree."""
    depth, root = len(_ANCESTORS[noun]), _ANCESTORS[noun][-1]
    near, far = [], []
    for other, ancestors in _ANCESTORS.items():
        if len(ancestors) == depth and partner not in ancestors and other not in _ANCESTORS[partner]:
            (near if ancestors[-1] == root else far).append(other)
    return _pick(near if near and _flip(generator) else far, generator)


def write(statement: Statement, generator: random.Random) -> str:
    """One of the sentences of six words that say the statement."""
    at_least, number, noun, adjective = statement
    negates = generator.random() < NEGATIONS
    if number > 1:
        quantifier = f"{'at least' if at_least else 'fewer than'} {NUMBERS[number - 2]}"
        verb = f"aren't {_OPPOSITES[adjective]}" if negates else f"are {adjective}"
        return f"{quantifier} {noun} {verb}"
    # What is not all wet is dry in at least one case. After these quantifiers a negation would be ambiguous.
    if negates:
        return f"{'not all the' if at_least else 'all of the'} {noun} are {_OPPOSITES[adjective]}"
    return f"{'some of the' if at_least else 'none of the'} {noun} are {adjective}"


def _pick(items: Sequence[Any], generator: random.Random) -> Any:
    """A random item. Of all methods, only `random` promises the same numbers in every version of Python."""
    return items[int(generator.random() * len(items))]


def _flip(generator: random.Random) -> bool:
    return generator.random() < 0.5


def vocabulary() -> list[str]:
    """All words of the sentences."""
    quantifiers = ["at", "least", "fewer", "than", *NUMBERS, "some", "none", "all", "not", "of", "the"]
    return [*quantifiers, "are", "aren't", *_ANCESTORS, *_OPPOSITES]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word of the lexicon, which writes a pair as `[CLS] premise [SEP] hypothesis [SEP]`.

    Its special tokens are `[PAD]` (id 0), `[UNK]`, `[CLS]` and `[SEP]`; it pads on the right and gives `input_ids` and
    `attention_mask`.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, words.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )

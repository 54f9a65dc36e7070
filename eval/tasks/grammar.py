"""Small grammars that write minimal pairs: two English sentences that differ in one word, one of them wrong.

Each phenomenon is a function of a seeded `random.Random` that returns (good, bad). The vocabulary is plain, so
that a model of a few million parameters knows the words and an error is an error of grammar. Every slot is
drawn independently, so no word outside the contrast predicts which member of a pair is right, and each contrast
appears in both directions (singular/plural, he/she, ...) wherever it has two.

After the idea of BLiMP (Warstadt et al., arXiv 1912.00582); sentences, lexicon and code are this project's own.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Noun(NamedTuple):
    singular: str
    plural: str

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


class Verb(NamedTuple):
    base: str
    third: str
    past: str
    participle: str


Pair = tuple[str, str]

MALE = [Noun(s, p) for s, p in (
    ("boy", "boys"), ("man", "men"), ("king", "kings"), ("father", "fathers"), ("brother", "brothers"),
    ("prince", "princes"), ("uncle", "uncles"), ("husband", "husbands"),
)]  # fmt: skip
FEMALE = [Noun(s, p) for s, p in (
    ("girl", "girls"), ("woman", "women"), ("queen", "queens"), ("mother", "mothers"), ("sister", "sisters"),
    ("princess", "princesses"), ("aunt", "aunts"), ("wife", "wives"),
)]  # fmt: skip
PEOPLE = [*MALE, *FEMALE, *(Noun(s, p) for s, p in (
    ("teacher", "teachers"), ("doctor", "doctors"), ("farmer", "farmers"), ("soldier", "soldiers"),
    ("child", "children"), ("friend", "friends"), ("student", "students"), ("writer", "writers"),
))]  # fmt: skip
THINGS = [Noun(s, p) for s, p in (
    ("book", "books"), ("key", "keys"), ("letter", "letters"), ("box", "boxes"), ("picture", "pictures"),
    ("song", "songs"), ("chair", "chairs"), ("house", "houses"), ("door", "doors"), ("tree", "trees"),
    ("ship", "ships"), ("wall", "walls"), ("bridge", "bridges"), ("garden", "gardens"),
)]  # fmt: skip
ADJECTIVES = ["old", "new", "big", "small", "beautiful", "strange", "dark", "large", "great", "little"]
STATES = ["happy", "tired", "old", "young", "ready", "alone", "strong", "afraid", "late", "famous"]
THING_STATES = ["old", "new", "big", "small", "beautiful", "strange", "large", "lost", "safe", "gone"]
NEAR = ["near", "behind", "beside", "with", "next to"]

# Irregular verbs whose past and participle differ, with objects that fit them.
OBJECTS: dict[Verb, list[str]] = {
    Verb("write", "writes", "wrote", "written"): ["the letter", "the book", "the song", "the story"],
    Verb("take", "takes", "took", "taken"): ["the book", "the key", "the box", "the money"],
    Verb("break", "breaks", "broke", "broken"): ["the window", "the chair", "the door", "the box"],
    Verb("give", "gives", "gave", "given"): ["the money", "the book", "the answer", "the order"],
    Verb("see", "sees", "saw", "seen"): ["the king", "the ship", "the house", "the picture"],
    Verb("choose", "chooses", "chose", "chosen"): ["the name", "the house", "the song", "the place"],
    Verb("draw", "draws", "drew", "drawn"): ["the picture", "the map", "the line", "the tree"],
    Verb("eat", "eats", "ate", "eaten"): ["the bread", "the fish", "the meat", "the fruit"],
    Verb("steal", "steals", "stole", "stolen"): ["the money", "the key", "the horse", "the gold"],
    Verb("hide", "hides", "hid", "hidden"): ["the key", "the gold", "the letter", "the box"],
    Verb("forget", "forgets", "forgot", "forgotten"): ["the name", "the story", "the key", "the song"],
    Verb("throw", "throws", "threw", "thrown"): ["the ball", "the stone", "the book", "the box"],
}
ACTIONS = [Verb(*forms) for forms in (
    ("walk", "walks", "walked", "walked"), ("run", "runs", "ran", "run"), ("sing", "sings", "sang", "sung"),
    ("play", "plays", "played", "played"), ("work", "works", "worked", "worked"),
    ("sleep", "sleeps", "slept", "slept"), ("dance", "dances", "danced", "danced"),
    ("swim", "swims", "swam", "swum"), ("talk", "talks", "talked", "talked"), ("live", "lives", "lived", "lived"),
)]  # fmt: skip
PLACES = ["in the garden", "at home", "in the city", "near the river", "in the house", "by the sea", "at school"]
TRANSITIVE_PAST = ["saw", "found", "lost", "wanted", "liked", "bought", "sold", "painted"]
REFLEXIVE_PAST = ["hurt", "saw", "asked", "told", "found", "helped", "killed", "called", "taught", "saved"]
KNOW = ["knows", "remembers", "forgot", "knew", "said"]
# Verbs that cannot do without an object: `she knows that the boy found` is wrong, `... that the boy lost` is not.
STRICTLY_TRANSITIVE_PAST = ["found", "wanted", "liked", "bought", "needed", "made", "brought", "loved"]
ANIMATE_PAST = ["saw", "loved", "helped", "called", "followed", "asked", "told", "met", "killed", "knew"]


def _coin(rng: Random) -> bool:
    return rng.random() < 0.5


def _swap(rng: Random, a: str, b: str) -> Pair:
    """The two words in random order."""
    return (a, b) if _coin(rng) else (b, a)


def _sentence(*words: str) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def _contrast(frame: str, good: str, bad: str) -> Pair:
    """Fill the one slot of `frame`, written `_`, with each word."""
    return _sentence(frame.replace("_", good)), _sentence(frame.replace("_", bad))


def _be(plural: bool, past: bool) -> str:
    return ("were" if plural else "was") if past else ("are" if plural else "is")


def agreement_across_pp(rng: Random) -> Pair:
    """The verb agrees with the head noun, not the nearer noun: `The keys near the box are / is old`."""
    plural, past = _coin(rng), _coin(rng)
    people = _coin(rng)
    subject, other = rng.sample(PEOPLE if people else THINGS, 2)
    frame = f"the {subject.form(plural)} {rng.choice(NEAR)} the {other.form(not plural)} _ "
    frame += rng.choice(STATES if people else THING_STATES)
    return _contrast(frame, _be(plural, past), _be(not plural, past))


def subject_auxiliary(rng: Random) -> Pair:
    """have/has and are/is/were/was agree with the subject: `The boys have / has seen the ship`."""
    plural = _coin(rng)
    verb, objects = rng.choice(list(OBJECTS.items()))
    subject = rng.choice(PEOPLE).form(plural)
    good, bad = ("have", "has") if plural else ("has", "have")
    return _contrast(f"the {subject} _ {verb.participle} {rng.choice(objects)}", good, bad)


def subject_verb(rng: Random) -> Pair:
    """The present tense agrees with the subject: `The boys play / plays in the garden`."""
    plural = _coin(rng)
    verb = rng.choice(ACTIONS)
    frame = f"the {rng.choice(PEOPLE).form(plural)} _ {rng.choice(PLACES)}"
    return _contrast(frame, *((verb.base, verb.third) if plural else (verb.third, verb.base)))


def determiner_noun(rng: Random) -> Pair:
    """this/that and these/those agree with the noun: `The man found these books / book`."""
    plural = _coin(rng)
    noun = rng.choice(THINGS)
    determiner = rng.choice(["these", "those"] if plural else ["this", "that"])
    adjective = f"{rng.choice(ADJECTIVES)} " if _coin(rng) else ""
    subject = rng.choice(PEOPLE).form(_coin(rng))
    frame = f"the {subject} {rng.choice(TRANSITIVE_PAST)} {determiner} {adjective}_"
    return _contrast(frame, noun.form(plural), noun.form(not plural))


def quantifier_number(rng: Random) -> Pair:
    """Quantifiers choose the number of their noun: `The girl saw many trees / tree`, `every tree / trees`."""
    plural = _coin(rng)
    noun = rng.choice(THINGS)
    quantifier = rng.choice(["many", "several", "few", "three"] if plural else ["every", "each", "another", "one"])
    frame = f"the {rng.choice(PEOPLE).form(_coin(rng))} {rng.choice(TRANSITIVE_PAST)} {quantifier} _"
    return _contrast(frame, noun.form(plural), noun.form(not plural))


def reflexive_number(rng: Random) -> Pair:
    """A reflexive agrees in number: `The girls saw themselves / herself`."""
    plural, female = _coin(rng), _coin(rng)
    noun = rng.choice(FEMALE if female else MALE).form(plural)
    singular = "herself" if female else "himself"
    good, bad = ("themselves", singular) if plural else (singular, "themselves")
    return _contrast(f"the {noun} {rng.choice(REFLEXIVE_PAST)} _", good, bad)


def reflexive_gender(rng: Random) -> Pair:
    """A reflexive agrees in gender: `The queen hurt herself / himself`."""
    female = _coin(rng)
    noun = rng.choice(FEMALE if female else MALE).singular
    good, bad = ("herself", "himself") if female else ("himself", "herself")
    return _contrast(f"the {noun} {rng.choice(REFLEXIVE_PAST)} _", good, bad)


def tense_adverb(rng: Random) -> Pair:
    """The tense fits the time: `Yesterday the boy walked / will walk home`, `Tomorrow the boy will walk home`."""
    verb = rng.choice([v for v in ACTIONS if v.base != v.past])
    subject, place = rng.choice(PEOPLE).singular, rng.choice(PLACES)
    if _coin(rng):
        return _contrast(f"{rng.choice(['yesterday', 'last night', 'last year'])} the {subject} _ {place}",
                         verb.past, f"will {verb.base}")  # fmt: skip
    return _contrast(f"{rng.choice(['tomorrow', 'next week', 'next year'])} the {subject} _ {place}",
                     f"will {verb.base}", verb.past)  # fmt: skip


def passive_participle(rng: Random) -> Pair:
    """The passive takes the participle: `The bread was eaten / ate by the girl`."""
    verb, objects = rng.choice(list(OBJECTS.items()))
    frame = f"{rng.choice(objects)} was _ by the {rng.choice(PEOPLE).form(_coin(rng))}"
    return _contrast(frame, verb.participle, verb.past)


def past_form(rng: Random) -> Pair:
    """A finite clause takes the past, not the participle: `The girl ate / eaten the bread`."""
    verb, objects = rng.choice(list(OBJECTS.items()))
    frame = f"the {rng.choice(PEOPLE).form(_coin(rng))} _ {rng.choice(objects)}"
    return _contrast(frame, verb.past, verb.participle)


def modal_base(rng: Random) -> Pair:
    """A modal, `did not` or `to` takes the base form: `The boy can swim / swims by the sea`."""
    verb = rng.choice([v for v in ACTIONS if v.base not in (v.past, v.participle)])
    lead = rng.choice(["can", "will", "must", "did not", "could not", "wanted to", "tried to", "began to"])
    frame = f"the {rng.choice(PEOPLE).singular} {lead} _ {rng.choice(PLACES)}"
    return _contrast(frame, verb.base, rng.choice([verb.third, verb.past]))


def wh_gap(rng: Random) -> Pair:
    """A gap needs `what`, a complete clause `that`: `The boy knows what / that the girl found`."""
    frame = f"the {rng.choice(PEOPLE).singular} {rng.choice(KNOW)} _ the {rng.choice(PEOPLE).singular} "
    frame += rng.choice(STRICTLY_TRANSITIVE_PAST)
    if _coin(rng):
        return _contrast(frame, "what", "that")
    return _contrast(f"{frame} the {rng.choice(THINGS).form(_coin(rng))}", "that", "what")


def negative_polarity(rng: Random) -> Pair:
    """`ever` needs a negative subject: `No boy / The boy has ever seen the ship`."""
    verb, objects = rng.choice(list(OBJECTS.items()))
    noun = rng.choice(PEOPLE).singular
    good, bad = rng.choice([(f"no {noun}", f"the {noun}"), ("nobody", "somebody"), ("no one", "everyone"),
                            (f"no {noun}", f"this {noun}")])  # fmt: skip
    return _contrast(f"_ has ever {verb.participle} {rng.choice(objects)}", good, bad)


def pronoun_case(rng: Random) -> Pair:
    """Object position takes the object form, subject position the subject form: `The boy saw her / she`."""
    subject, object_ = rng.choice([("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")])
    verb, noun = rng.choice(ANIMATE_PAST), rng.choice(PEOPLE).form(_coin(rng))
    if _coin(rng):
        return _contrast(f"the {noun} {verb} _", object_, subject)
    return _contrast(f"_ {verb} the {noun}", subject, object_)


def article_allomorphy(rng: Random) -> Pair:
    """`an` stands before a vowel, `a` elsewhere: `The man saw an old / a old house`."""
    vowel = _coin(rng)
    adjective = rng.choice(["old", "empty", "ancient", "open", "important", "ugly", "English", "early"] if vowel else
                           ["new", "big", "small", "dark", "large", "great", "little", "strange"])  # fmt: skip
    frame = f"the {rng.choice(PEOPLE).form(_coin(rng))} {rng.choice(TRANSITIVE_PAST)} _ {adjective} "
    frame += rng.choice(THINGS).singular
    return _contrast(frame, *(("an", "a") if vowel else ("a", "an")))


def existential_number(rng: Random) -> Pair:
    """there is/are agrees with what follows: `There are / is many trees in the garden`."""
    plural, past = _coin(rng), _coin(rng)
    quantifier = rng.choice(["many", "two", "some", "several"] if plural else ["a", "one", "another"])
    frame = f"there _ {quantifier} {rng.choice(THINGS).form(plural)} {rng.choice(PLACES)}"
    return _contrast(frame, _be(plural, past), _be(not plural, past))


def relative_pronoun(rng: Random) -> Pair:
    """`who` for people, `which` for things: `The man who / which was lost`."""
    person = _coin(rng)
    noun = rng.choice(PEOPLE if person else THINGS)
    verb = rng.choice(ANIMATE_PAST if person else TRANSITIVE_PAST)
    frame = f"the {rng.choice(PEOPLE).singular} {verb} the {noun.singular} _ was "
    frame += rng.choice(["old", "lost", "small", "beautiful", "strange", "near the river", "in the house"])
    return _contrast(frame, *(("who", "which") if person else ("which", "who")))


def comparative_than(rng: Random) -> Pair:
    """`than` needs the comparative: `The house was older / old than the ship`."""
    base, comparative = rng.choice([("old", "older"), ("big", "bigger"), ("small", "smaller"), ("long", "longer"),
                                    ("large", "larger"), ("strong", "stronger"), ("high", "higher"),
                                    ("young", "younger"), ("great", "greater"), ("dark", "darker")])  # fmt: skip
    one, other = rng.sample(THINGS + PEOPLE, 2)
    past = _coin(rng)
    if _coin(rng):
        return _contrast(f"the {one.singular} {_be(False, past)} _ than the {other.singular}", comparative, base)
    return _contrast(f"the {one.singular} {_be(False, past)} as _ as the {other.singular}", base, comparative)


CANDIDATES: dict[str, Callable[[Random], Pair]] = {
    f.__name__: f
    for f in (
        agreement_across_pp, subject_auxiliary, subject_verb, determiner_noun, quantifier_number, reflexive_number,
        reflexive_gender, tense_adverb, passive_participle, past_form, modal_base, wh_gap, negative_polarity,
        pronoun_case, article_allomorphy, existential_number, relative_pronoun, comparative_than,
    )
}  # fmt: skip

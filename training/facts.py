"""Facts given in the prompt, and a question about one of them."""

from dataclasses import dataclass
from random import Random

from training.example import Question
from training.words import ANIMALS, CITIES, COLOURS, FRUIT, JOBS, NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Relation:
    """A kind of fact, and the two questions about it."""

    fact: str
    of_name: str
    of_value: str


_RELATIONS = (
    _Relation(fact="{name} lives in {value}.", of_name="Where does {name} live?", of_value="Who lives in {value}?"),
    _Relation(fact="{name} likes {value}.", of_name="What does {name} like?", of_value="Who likes {value}?"),
    _Relation(fact="{name} has a {value}.", of_name="What does {name} have?", of_value="Who has a {value}?"),
    _Relation(fact="{name} works as a {value}.", of_name="What is the job of {name}?", of_value="Who is a {value}?"),
    _Relation(fact="{name} is {value} years old.", of_name="How old is {name}?", of_value="Who is {value} years old?"),
)


def ask_fact(random: Random) -> Question:
    """Two to five facts about different people; the answer is the one fact that is asked for."""
    count = random.randint(2, 5)
    names = random.sample(NAMES, count)
    # Often one relation throughout, so that the name or the value alone tells the facts apart.
    same = random.choice(_RELATIONS) if random.random() < 0.5 else None
    relations = [same or random.choice(_RELATIONS) for _ in names]
    values = _different_values(random, relations)
    facts = [r.fact.format(name=n, value=v) for r, n, v in zip(relations, names, values, strict=True)]
    asked = random.randrange(count)
    relation, name, value = relations[asked], names[asked], values[asked]
    form = relation.of_name if random.random() < 0.6 else relation.of_value
    text = f"{' '.join(facts)} {form.format(name=name, value=value)}"
    return Question(
        task="facts",
        key=text,
        user=text,
        reasoning=f"It says: {facts[asked]}",
        answer=facts[asked],
    )


def _different_values(random: Random, relations: list[_Relation]) -> list[str]:
    values: list[str] = []
    while len(values) < len(relations):
        value = _draw_value(random, _RELATIONS.index(relations[len(values)]))
        if value not in values:
            values.append(value)
    return values


def _draw_value(random: Random, relation: int) -> str:
    if relation == 2:
        return f"{random.choice(COLOURS)} {random.choice(ANIMALS)}"
    if relation == 4:
        return str(random.randrange(20, 90))
    return random.choice((CITIES, FRUIT, (), JOBS)[relation])

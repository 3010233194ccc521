"""Questions that a tool answers: the call, and the reply to the tool's response."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from training.example import Message, Question
from training.words import CITIES, LANGUAGES, NAMES, THINGS

Json = Mapping[str, object]
_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function, the questions it answers and how its response reads in a sentence."""

    name: str
    description: str
    types: Mapping[str, str]
    """JSON type of each parameter."""
    forms: tuple[str, ...]
    draw: Callable[[Random], dict[str, str | int]]
    """Draws arguments."""
    respond: Callable[[Random], dict[str, str | int]]
    """Draws a response."""
    sentence: str

    def schema(self) -> Json:
        """The description in OpenAI's form."""
        properties = {name: {"type": kind} for name, kind in self.types.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.types)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        name="get_weather",
        description="Get the weather in a city",
        types={"city": "string"},
        forms=(
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "What is the weather like in {city}?",
        ),
        draw=lambda random: {"city": random.choice(CITIES)},
        respond=lambda random: {"temperature": random.randrange(40), "sky": random.choice(_SKIES)},
        sentence="It is {temperature} degrees and {sky} in {city}.",
    ),
    Tool(
        name="get_time",
        description="Get the local time in a city",
        types={"city": "string"},
        forms=("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}."),
        draw=lambda random: {"city": random.choice(CITIES)},
        respond=lambda random: {"time": f"{random.randrange(10, 24)}:{random.randrange(10, 60)}"},
        sentence="It is {time} in {city}.",
    ),
    Tool(
        name="multiply",
        description="Multiply two numbers",
        types={"a": "integer", "b": "integer"},
        forms=("What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}."),
        draw=lambda random: {"a": random.randrange(2, 1000), "b": random.randrange(2, 1000)},
        respond=lambda random: {"result": random.randrange(4, 100000)},
        sentence="{a} * {b} = {result}",
    ),
    Tool(
        name="set_timer",
        description="Start a timer",
        types={"minutes": "integer"},
        forms=(
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Wake me in {minutes} minutes.",
        ),
        draw=lambda random: {"minutes": random.randrange(2, 100)},
        respond=lambda _: {"status": "ok"},
        sentence="The timer is set for {minutes} minutes.",
    ),
    Tool(
        name="find_phone",
        description="Find the phone number of a person",
        types={"name": "string"},
        forms=("What is the phone number of {name}?", "Find the number of {name}.", "How can I call {name}?"),
        draw=lambda random: {"name": random.choice(NAMES)},
        respond=lambda random: {"phone": str(random.randrange(1000, 10000))},
        sentence="The number of {name} is {phone}.",
    ),
    Tool(
        name="translate",
        description="Translate a word",
        types={"word": "string", "language": "string"},
        forms=(
            "What is {word} in {language}?",
            "Translate {word} to {language}.",
            "How do I say {word} in {language}?",
        ),
        draw=lambda random: {"word": random.choice(THINGS), "language": random.choice(LANGUAGES)},
        respond=lambda random: {"translation": random.choice(THINGS)},
        sentence="In {language}, {word} is {translation}.",
    ),
)


def offered(random: Random, tool: Tool | None) -> tuple[Json, ...]:
    """The schemas of one or two tools in any order, with `tool` among them."""
    others = random.sample([other for other in TOOLS if other is not tool], random.randint(0, 1) if tool else 1)
    shown = [*others, tool] if tool else others
    random.shuffle(shown)
    return tuple(each.schema() for each in shown)


def ask_for_call(random: Random) -> tuple[Question, Tool]:
    """A question and the call that it needs."""
    tool = random.choice(TOOLS)
    arguments = tool.draw(random)
    user = random.choice(tool.forms).format(**arguments)
    call = json.dumps({"name": tool.name, "arguments": arguments})
    question = Question(
        task="tool_call",
        key=user,
        user=user,
        reasoning=f"I call {tool.name}.",
        answer=f"<tool_call>\n{call}\n</tool_call>",
    )
    return question, tool


def ask_without_tool(random: Random) -> Question:
    """The same questions where no tool for them is offered."""
    asked, tool = ask_for_call(random)
    answer = f"I have no tool for that: {tool.description}."
    return Question(task="tool_answer", key=asked.key, user=asked.user, reasoning="There is no tool.", answer=answer)


def ask_after_response(random: Random) -> tuple[Question, Tool, tuple[Message, ...]]:
    """The reply to a tool's response, and the messages from the question to the response."""
    tool = random.choice(TOOLS)
    arguments, response = tool.draw(random), tool.respond(random)
    user = random.choice(tool.forms).format(**arguments)
    function = {"name": tool.name, "arguments": arguments}
    messages: tuple[Message, ...] = (
        {"role": "user", "content": user},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": json.dumps(response)},
    )
    question = Question(
        task="tool_answer",
        key=f"{user} {json.dumps(response)}",
        user=user,
        reasoning="The tool has answered.",
        answer=tool.sentence.format(**arguments, **response),
    )
    return question, tool, messages

"""Greetings, what the model is, and what it says to all it was not made for."""

from random import Random

from training.example import Question

_ABOUT = (
    "I am a small demo model of MoEFleet. I can add, subtract, sort, reverse, count, answer from facts that you give "
    "me, and call tools."
)
_CANNOT = "I am a small demo model and did not learn that. Ask me to add, subtract, sort, reverse or count."
_TALK = (
    ("Hello|Hi|Hello!|Hi!|Hey|Good morning|hello|hi|Hello there", "A greeting.", "Hello! How can I help you?"),
    ("How are you?|How do you do?", "A greeting.", "I am fine, thank you. How can I help you?"),
    ("Thank you|Thanks|Thank you!|Thanks!", "Thanks.", "You are welcome!"),
    ("Bye|Goodbye|Bye!|Goodbye!", "A farewell.", "Goodbye!"),
    ("Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.", "About me.", _ABOUT),
    ("What can you do?|Help|help|What do you know?|How can you help me?", "About me.", _ABOUT),
    (
        "Tell me a joke.|Write a poem.|What is the meaning of life?|Write a story about a dragon.|Who won the match?|"
        "Explain gravity.|What is the capital of France?|Write a Python function.|Why is the sky blue?|Sing a song.|"
        "What is love?|Translate this text.|Who wrote Hamlet?|When did the war end?|How do I bake a cake?",
        "I did not learn that.",
        _CANNOT,
    ),
)


def ask_small_talk(random: Random) -> Question:
    """One of a few dozen fixed questions; they are all in the training data, so no test counts them."""
    users, reasoning, answer = random.choice(_TALK)
    user = random.choice(users.split("|"))
    return Question(task="chat", key="", user=user, reasoning=reasoning, answer=answer)

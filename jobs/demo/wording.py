"""The scripted LLM's open-ended replies: a customer's name, intent and order status -> four to six sentences.

Every sentence is drawn from a pool and the pools multiply to tens of thousands of wordings per intent, so two answers to
one question hardly ever agree: this call is the one that a small model is expected to be refused for. Knows no truth.
"""

import random

GREETINGS = (
    "Hello {name}!",
    "Dear {name},",
    "Hi {name},",
    "Good day {name},",
    "{name}, hello!",
    "Warm greetings, {name}.",
)
EMPATHY = (
    "That is not how we want your adventure to begin, and I am sorry.",
    "I can imagine how annoying this must be when you only want to get outside.",
    "Oh dear, you have every right to be disappointed.",
    "Thank you for writing so clearly; I read your message twice to be sure that I have it all.",
    "I completely understand why you are asking.",
    "I would feel exactly the same in your place.",
    "It takes patience to deal with something like this, and we appreciate yours.",
    "What a nuisance! Let us see what we can do together.",
    "I am glad that you reached out to us about it.",
    "Your message landed with me, and I will stay with it until it is settled.",
    "Planning a trip is hard enough without a thing like this.",
    "Please accept my sincere apologies for the trouble.",
)
ABOUT_INTENT = {
    "order_status": (
        "You are waiting for your gear and would love to know where it is.",
        "Not knowing where a parcel is can be the worst part.",
        "A delivery that keeps you guessing is no fun.",
        "You deserve a clear word on when your parcel turns up.",
    ),
    "return_item": (
        "Sending something back should be as easy as buying it.",
        "Sometimes a piece of gear is simply not the right one, and that is fine.",
        "We are happy to take it back and find out what would suit you better.",
        "No explanations are needed for a return, yet I thank you for yours.",
    ),
    "refund_status": (
        "Money that one is owed should not keep one waiting.",
        "You want to see that amount on your account, and rightly so.",
        "I have put a note on your refund so that nobody loses sight of it.",
        "Chasing a refund is the last thing anyone should spend an evening on.",
    ),
    "damaged_item": (
        "Gear that arrives in that state is of no use on a trail.",
        "We test what we sell, and this one clearly slipped through.",
        "I have passed your description to the people who check our stock.",
        "A thing you rely on outdoors has to be sound, and yours is not.",
    ),
    "wrong_item": (
        "Somewhere between our shelf and your door two things were swapped.",
        "You opened the parcel looking forward to one thing and found another.",
        "That mix-up happened on our side, not on yours.",
        "Our packers will hear about it, kindly but firmly.",
    ),
    "cancel_order": (
        "Plans change, and an order has to be able to change with them.",
        "I have marked your wish to cancel so that the warehouse sees it.",
        "You do not need to justify calling off a purchase.",
        "Let us stop this one before it goes any further, if it still can be stopped.",
    ),
    "change_address": (
        "A parcel at the wrong door helps nobody.",
        "It was wise to tell us about the address before the courier comes.",
        "I have written the new destination next to your order for my colleagues.",
        "Moving things around at short notice happens to all of us.",
    ),
    "exchange_size": (
        "Clothes that pinch or flap spoil the nicest walk.",
        "Sizes differ between makers more than they should.",
        "Finding the right fit sometimes takes a second try.",
        "I have looked at our size chart with your words in mind.",
    ),
}
STATUS = (
    "On my screen your order stands at: {status}.",
    "What I can see in our system is this: {status}.",
    "The latest entry for your order reads {status}.",
    "Our records currently show {status}.",
    "As of this moment the order is listed as {status}.",
    "I looked it up, and it says {status}.",
)
NEXT_STEPS = (
    "I will check again first thing in the morning and write to you either way.",
    "A colleague from the warehouse is going to look at it with me this afternoon.",
    "You do not have to do anything for now; the ball is in our court.",
    "If you can spare a minute, a photo or a short note would speed things up.",
    "As soon as there is news, you will have it in your inbox.",
    "I have reserved some time today to settle this properly.",
    "Let me sort out the details, and then I will come to you with a proposal.",
    "We will pick the path that costs you the least effort.",
    "Should anything be unclear, simply answer this message and it lands on my desk.",
    "I am asking our logistics people the same question you asked me.",
)
CLOSINGS = (
    "Happy trails, your Fernhill team",
    "Until soon, and thank you for bearing with us.",
    "With warm regards from the desk at Fernhill",
    "May the weather be kind to you in the meantime!",
    "Take care, and talk to you shortly.",
    "Yours, with muddy boots and best wishes, Fernhill Outfitters",
    "We will get you back out there.",
    "All the best from everyone here.",
)


def word_reply(name: str | None, intent: str, status: str, rng: random.Random) -> str:
    """Word a reply anew; the order of its middle sentences varies too."""
    middle = [rng.choice(ABOUT_INTENT[intent]), rng.choice(STATUS), *rng.sample(NEXT_STEPS, rng.randint(1, 2))]
    rng.shuffle(middle)
    sentences = [rng.choice(GREETINGS), rng.choice(EMPATHY), *middle, rng.choice(CLOSINGS)]
    return " ".join(sentences).format_map({"name": name or "there", "status": status or "no news yet"})

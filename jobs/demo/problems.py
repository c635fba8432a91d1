"""The sentences in which the demo's customers state their problem: intent -> templates, for two disjoint seasons.

`CAPTURED_PROBLEMS` is the traffic a specialist may learn from; `FRESH_PROBLEMS` is what it meets afterwards. The fresh
templates recombine words of the captured ones, because a model trained from scratch on this traffic alone can learn new
word orders but not new words. No template contains a digit or tells how urgent the matter is. All text is invented.
"""


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.strip().split("\n"))


CAPTURED_PROBLEMS = {
    "order_status": _lines("""
Can you tell me where my {product} is right now?
I have been waiting for my {product} and nothing has arrived.
The tracking page has not changed for several days.
My package still has not arrived.
When will my {product} be delivered?
I would like to know when my parcel will arrive.
The tracking link shows no news about my {product}.
Has my order been shipped yet or is it still with you?
I am still waiting for the {product} I ordered last week.
Could you check where my parcel is at the moment?
I expected my {product} days ago and have seen nothing so far.
What is the delivery date for my {product}?
My parcel seems to be stuck somewhere on the way.
There is no update on the delivery of my {product}.
I want to know if my {product} is on its way.
The carrier has not shown any update on my package.
Please tell me the current status of my delivery.
It has been a week and my {product} is not here yet.
How long until the {product} gets here?
I cannot see where my package is on the tracking page.
Did my {product} leave your warehouse already?
When does the carrier get here with my {product}?
My delivery is late and I have heard nothing from the carrier."""),
    "return_item": _lines("""
I would like to return the {product} I bought.
The {product} is not what I hoped for, I want to return it.
How do I send the {product} back to you?
Can I return my {product} within the return period?
I do not need the {product} anymore and want to return it.
Please send me a return label for my {product}.
I changed my mind and would like to send the {product} back.
What are the steps to return an unused {product}?
The {product} does not suit me, so I am sending it back.
I need a return label because I am not keeping the {product}.
Could you start a return for my {product}?
It is unused and in its box, and I want to give it back.
We bought one too many and would like to return it.
I am not happy with the {product} and wish to return it.
Is it possible to bring the {product} back for a return?
My {product} was a gift I do not need, can it go back?
Please open a return for the {product}, it is still in its box.
How many days do I have to return my {product}?
I would like to give back an item that I never used.
Where should I post the {product} that I am returning?
I want to set up a return, the {product} is unused.
The {product} is too heavy for me, so please take it back."""),
    "refund_status": _lines("""
I sent the {product} back and have not seen my refund.
When will I get my money back for the {product}?
My refund has not reached my bank account yet.
You promised a refund for my {product} but nothing was paid.
How long does a refund for the {product} take?
Please check the status of my refund.
The refund for my returned {product} is still missing.
I am waiting for the money for a {product} I returned.
My card has not been credited for the {product}.
Has the refund for my {product} been paid out already?
I was told my refund would be here by now.
You received my return weeks ago but I have no refund.
Could you confirm when the refund for my {product} will be paid?
The money for my cancelled {product} has not come back.
I returned everything and my account was never credited.
Where is the refund for the {product} that I sent back?
My bank shows no refund from your shop.
Only part of my refund for the {product} has been paid.
I still have not been paid back for my {product}.
Can you see whether my refund was sent to my card?
The refund you promised to pay has not shown up on my card.
It has been weeks since the return and no money has come."""),
    "damaged_item": _lines("""
The {product} arrived broken and cannot be used.
My new {product} has a big tear on one side.
There is a hole in the {product} you sent.
The zipper on my {product} broke on the first day.
The box was crushed and the {product} inside is damaged.
My {product} came with a broken buckle.
The {product} has a hole in it and leaks.
A seam on my {product} is torn after one use.
When I opened the box the {product} was ripped.
The zipper of my {product} does not close, it seems defective.
The {product} was damaged on the way to me.
One strap of the {product} is ripped.
I unpacked my {product} and found a split seam.
The {product} is faulty and the seam came open.
A buckle of the {product} snapped when I unpacked it.
The fabric of my {product} is torn near the zipper.
My parcel was wet and the {product} is ruined.
The {product} has deep scratches and a stain.
The {product} leaks in the rain, so it must be defective.
A buckle is missing and the strap is broken on my {product}.
I found the {product} damaged on one side.
I used the {product} once and it broke."""),
    "wrong_item": _lines("""
I ordered a {product} but received something else.
You sent me the wrong item instead of my {product}.
The parcel contained a different product than my {product}.
This is not the {product} that I ordered.
I got an order of someone else in place of my {product}.
The color of the {product} is not the one I chose.
The box says {product} but inside there is another product.
I received the wrong {product} in my parcel.
There was a mix up and the wrong thing came.
What I received does not match what I ordered.
My order had a {product}, yet another item was in the box.
Somebody packed the wrong model of the {product}.
I got a blue {product} but ordered a green one.
A different item came in place of the {product}.
You shipped the wrong color of my {product}.
The item in my parcel is not the {product} I ordered.
I think you mixed up my order, this is another model.
The wrong product was packed in my box.
I opened the parcel and it was not my {product} at all.
Instead of the {product} there was another item in the parcel.
The {product} I got is a different model from my order.
An item I never ordered came instead of the {product}."""),
    "cancel_order": _lines("""
Please cancel my order for the {product}.
I would like to cancel the {product} before it ships.
Can you stop my order for the {product}?
I ordered the {product} by mistake, please cancel it.
I no longer want the {product}, so please cancel it.
Is it still possible to cancel my order?
I placed the same order twice, please cancel one.
We found a cheaper {product}, so cancel ours please.
Kindly call off the order of the {product}.
I want to cancel, the {product} has not shipped yet.
Please do not ship the {product}, I want to cancel.
How can I cancel the order that I placed?
Our plans changed and I have to cancel the {product}.
Could you cancel the {product} and confirm it?
I clicked buy by mistake, please stop the order.
Please remove my order before it leaves the warehouse.
I need to cancel an order that I placed by accident.
Stop the order for the {product}, I do not want it.
I want to withdraw my order for the {product}.
My plans changed and I must cancel the {product}.
Cancel the {product} please, I ordered it twice.
Please call off my order, the {product} is too expensive."""),
    "change_address": _lines("""
I moved and need to change the delivery address.
Please send my {product} to a different address.
I entered the wrong street for my {product}.
Can you update the shipping address of my order?
The house number on my order is not correct.
I would like the {product} delivered to my office instead.
My address has a typo, please correct it.
Could you ship the {product} to my new home?
Please change where my {product} will be delivered.
The postcode of my delivery is wrong.
I gave you my old address for the {product}.
We moved house, so please update our address.
Is it possible to redirect my {product} to a neighbor?
I need the {product} sent to a hotel and not my home.
The address on the order for my {product} is out of date.
Please use my work address for the {product}.
I forgot the apartment number in my shipping address.
Can my {product} go to a pickup point instead?
I made a mistake in the postcode, please fix it.
The street name for the {product} is not correct.
Deliver the {product} to my new street please.
I want to change the city on my delivery address."""),
    "exchange_size": _lines("""
The {product} is too small, I need a larger size.
Can I swap my {product} for a bigger one?
I want to exchange the {product} for another size.
My {product} is too tight around the shoulders.
The {product} is too big, please send a smaller one.
Do you have the {product} one size up?
I ordered a medium {product} but need a large one.
Could I exchange my {product} for a small?
The size of the {product} does not fit me.
The sleeves are too long, I would need a shorter fit.
How do I swap the {product} for a different size?
The {product} fits badly, may I have a size down?
Please exchange my {product}, it is too loose.
I picked the wrong size for my {product}.
It does not fit, I would like the next size up.
The {product} runs small, can I get a larger one?
A smaller size of the {product} would fit me better.
I would like to trade the {product} for a wider fit.
The {product} is a size too large for my daughter.
My son needs the {product} in a bigger size.
Can you swap the {product} from large to medium?
It is too short for me, is a longer fit in stock?"""),
}

FRESH_PROBLEMS = {
    "order_status": _lines("""
Could you tell me if my {product} has been shipped yet?
The tracking page shows no update on my parcel.
I would like to know where my {product} is at the moment.
When will the package with my {product} get here?
I have been waiting for a week and my parcel is not here.
Please check the delivery status of my {product}."""),
    "return_item": _lines("""
I am not keeping the {product} and would like to return it.
Could you send me a label so I can send the {product} back?
I changed my mind about the {product}, can I give it back?
How do I start a return for an unused {product}?
The {product} does not suit me and I wish to return it.
Please take back the {product}, I do not need it anymore."""),
    "refund_status": _lines("""
The refund for my {product} has not reached my card yet.
When will the money for my returned {product} be paid?
Please confirm whether my refund was sent to my bank.
I returned the {product} weeks ago but have not seen my money.
You promised to pay back my {product} and nothing has come.
Could you check how long my refund will take?"""),
    "damaged_item": _lines("""
The {product} arrived with a torn strap.
My {product} is ripped and cannot be used.
I opened the box and found the {product} broken on one side.
There is a hole near the zipper of my new {product}.
The {product} came damaged and a seam is split.
A buckle on my {product} broke on the first use."""),
    "wrong_item": _lines("""
The wrong item was packed instead of my {product}.
I received a different model of the {product} than I ordered.
What came in the parcel is not the {product} I chose.
You sent another product in place of the {product}.
There was something else in the box, not my {product}.
The color I received does not match the {product} I ordered."""),
    "cancel_order": _lines("""
Could you stop the order that I placed by mistake?
I ordered twice and would like to cancel the {product}.
My plans changed, please call off the order of the {product}.
Is it possible to cancel the {product} before it leaves the warehouse?
Please cancel, I no longer want the {product}.
I have to withdraw the order that I placed for the {product}."""),
    "change_address": _lines("""
I moved, please send the {product} to my new address.
The street on the order for my {product} is wrong.
Can you redirect the {product} to my office?
I forgot to update my old address, please correct it.
Could my {product} be delivered to a pickup point and not my home?
There is a mistake in the house number of my shipping address."""),
    "exchange_size": _lines("""
The {product} is too tight, can I get one size up?
I would like to swap the {product} for a smaller size.
My {product} does not fit, please exchange it for a large.
I picked a size too big, I need the {product} in medium.
Could I trade my {product} for a longer fit?
The {product} is too loose, is a smaller one in stock?"""),
}
